"""Code sent by value to child processes that may crash, hang or grow without harm.

`packing` writes what is sent into files without a name, `child` starts a process and ends it with its whole
family, `entry` is what runs there, `follow` waits for its answers under limits, and `local` is the executor
of this machine.
"""
