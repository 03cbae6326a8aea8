"""The live server: takes that people watch and steer over the network, within a byte budget.

    protocol    what clients and server say to each other
    admission   what a session will hold, in bytes, before it exists; who has reserved what
    fmp4, stream, recording    frames to H.264 fragments, to viewers, to a file
    parking     a session on disk: snapshots, the log of chunks, recovery
    take        one session of the server
    scheduler   the thread of a device: which take makes its next chunk
    service     the sessions of all devices, and whose they are
    access, app    tokens, quotas and the HTTP and WebSocket interface
    client      the other end, for Python
"""
