"""The commands of `longtake`, one file each, and what they share with the shell."""
