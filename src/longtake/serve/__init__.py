"""The live server: takes that people watch and steer over the network, within a byte budget.

protocol: what clients and server say to each other. admission: what a session will hold, in bytes, before it exists.
fmp4, stream, recording: frames to H.264 fragments, to viewers, to a file. parking: a session on disk, and its way back.
take: one session of the server. scheduler: the thread of a device, and whose turn it is. service: all sessions, and
whose they are. access, guard, app, server: tokens, quotas, HTTP and WebSockets. client: the other end, for Python.
"""
