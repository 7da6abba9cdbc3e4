"""Runs Python code in forked processes that die by SIGKILL right before they change the disk for the n-th time.

    python kill_server.py MODULE...      imports the modules once, then answers requests, one JSON object a line

A request has "code" (Python source), "argv", "root" (where it starts, and has temporary files), "output" and "log" (files), "die"
(a number, a kind and a pattern of paths, or null) and "half". The answer is the exit status, negative for a signal. Every
call of Python that changes something below `root` (a new file, a write, a rename, a removal, a new directory, a link) is a point,
and its kind and path go to the log. With "half", a write puts half of its bytes on the disk before the process dies.

Calls are counted by audit hooks, which see pathlib, shutil, tempfile and libraries too, and by a wrapper of `os.write`. Buffered
writes of file objects and writes of native code are not counted; the openings and renames around them are.
"""

import fnmatch
import importlib
import json
import os
import signal
import sys
import tempfile

CREATES = os.O_CREAT | os.O_TRUNC
# event -> positions of (path, file descriptor of the directory that a relative path starts from)
EVENTS = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
}


class Counter:
    """Counts the points of this process, and ends it at one of them."""

    def __init__(self, root: str, log: str, die: int | list[str] | None, half: bool):
        self.root, self.die, self.half, self.count = root, die, half, 0
        self.log, self.write = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.write

    def install(self) -> None:
        sys.addaudithook(self.audit)
        os.write = self.counted_write

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & CREATES:
            self.point(event, self.place(arguments[0]))
        elif event in EVENTS:
            places = [self.place(arguments[p], None if d is None else arguments[d]) for p, d in EVENTS[event]]
            if event != "os.mkdir" or not os.path.exists(places[0]):
                self.point(event, *places)

    def counted_write(self, fd: int, data) -> int:
        if self.point("write", self.place(fd), last=not self.half):
            self.write(fd, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return self.write(fd, data)

    def place(self, path, directory: int | None = None) -> str:
        """The absolute path of a path or of a file descriptor."""
        if isinstance(path, int):
            return _link(path)
        start = os.getcwd() if directory in (None, -1) else _link(directory)
        return os.path.normpath(os.path.join(start, os.fsdecode(path)))

    def point(self, kind: str, *paths: str, last: bool = True) -> bool:
        """Count one; the process ends here if it is the chosen one, and `last`. Whether it is the chosen one."""
        if not any(path == self.root or path.startswith(f"{self.root}/") for path in paths):
            return False
        self.count += 1
        self.write(self.log, (json.dumps([kind, os.path.relpath(paths[-1], self.root)]) + "\n").encode())
        chosen = self.count == self.die
        if isinstance(self.die, list):
            chosen = kind == self.die[0] and fnmatch.fnmatchcase(os.path.relpath(paths[-1], self.root), self.die[1])
        if chosen and last:
            os.kill(os.getpid(), signal.SIGKILL)
        return chosen


def _link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def child(request: dict) -> None:
    """Run the code of a request in this process, and end it."""
    code = 1
    try:
        with open(request["output"], "wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(request["root"])
        os.environ["TMPDIR"] = tempfile.tempdir = request["root"]
        sys.argv = ["lindm", *request["argv"]]
        Counter(request["root"], request["log"], request["die"], request["half"]).install()
        try:
            exec(compile(request["code"], "<request>", "exec"), {"__name__": "request"})
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
