"""How `flexivit` ends: its exit codes. The table for users is in docs/reliability.md.

128 + n is a second signal n, as a shell counts it; 1 is Python's, after a traceback: a fault of this program.
"""

DONE = 0
ERROR = 2  # a user's mistake or a fault of the machine, in one line on standard error
HUNG = 70  # EX_SOFTWARE of sysexits.h: nothing has gone on for `hang_after` seconds, or a process was lost
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command resumes
BROKEN_PIPE = 128 + 13  # as a shell counts SIGPIPE: who read the output has gone
