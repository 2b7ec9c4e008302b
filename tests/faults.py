"""Commands run in processes of their own, and harm done to them at a chosen step.

    server    `python faults.py module ...` imports once, then forks a process for every request: 20 ms, not 500
    step      an event of Python's audit log that names a file below a root, or the search for a function of libc
    harm      what happens right before one of the steps: a signal, a file that shrinks or vanishes, a full disk

Audit hooks see a process from outside: no line of the product knows of any of this. Reads and writes of bytes raise no
events; signals at random times fall there.
"""

import contextlib
import gc
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS, BYTES = 10, 500_000_000  # what no command on tiny models may exceed, whatever is in them
LIGHT = (
    *(f"arma_mergekit.cli.{name}" for name in ("plan", "merge", "verify", "reproduce", "gate", "progress")),
    *(f"arma_mergekit.{name}" for name in ("merge", "executor", "recipe", "evaluation", "gate", "card", "report")),
    "huggingface_hub", "encodings.utf_8_sig",
)  # fmt: skip
HEAVY = (
    *("toy", "torch", "transformers.models.llama.modeling_llama", "accelerate", "optuna", "cmaes"),
    *(f"arma_mergekit.{name}" for name in ("cli.tune", "run", "results", "engines.local", "report", "attention")),
)  # fmt: skip
REMOVALS = ("os.remove", "os.rmdir", "os.rename")
WRITES = (*REMOVALS, "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SOCKETS = ("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")


# ---- in the process that runs the command ----


class Watch:
    """The audit hook of one process: writes down its steps and what it touches, and does harm before one step."""

    def __init__(self, request):
        self.root, self.at, self.harm = request["root"], request["at"], request["harm"]
        self.log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.count, self.mine = itertools.count(), threading.local()

    def __call__(self, event, args):
        if getattr(self.mine, "busy", False) or not event.startswith(("open", "os.", "ctypes.dlsym")):
            return
        self.mine.busy = True
        paths = [] if event == "ctypes.dlsym" else list(places(event, args))
        writes = event in WRITES or (event == "open" and bool((args[2] or 0) & WRITING))
        step = event == "ctypes.dlsym" or any(p.startswith(self.root) for p in paths)
        if step or writes:
            with contextlib.suppress(OSError):  # limits of this process hold for the log too
                os.write(self.log, json.dumps([step, writes, event, *paths]).encode() + b"\n")
        if step and next(self.count) == self.at:  # once, whatever other threads do meanwhile
            do(self.harm)
        self.mine.busy = False


def places(event, args):
    """Absolute paths that an event names; removals may be relative to an open directory."""
    both = event == "os.rename"
    for path, folder in zip(args[: 1 + both], args[-1 - both :], strict=True):
        if isinstance(path, str | bytes | os.PathLike):
            at = f"/proc/self/fd/{folder}" if event in REMOVALS and folder >= 0 else "."
            yield os.path.normpath(os.path.join(os.path.realpath(at), os.fsdecode(path)))


def do(harm):
    """A signal to this process, a fault in a file, or a file that takes all the room there is."""
    kind, what = harm
    if kind == "signal":
        os.kill(os.getpid(), what)
    elif kind == "truncate":
        os.truncate(what, Path(what).stat().st_size // 2)
    elif kind == "zero":
        Path(what).write_bytes(bytes(Path(what).stat().st_size))
    elif kind == "unlink":
        Path(what).unlink()
    elif kind == "fill":
        with contextlib.suppress(OSError), open(what, "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1 << 12))


def refuse_sockets(event, _):
    """An audit hook: no name is looked up, no socket made."""
    if event in SOCKETS:
        raise PermissionError(f"This process may not reach the network ({event}).")


def run_request(request):
    """Do what is asked in this process and leave it; never returns."""
    for descriptor, name in ((0, "/dev/null"), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.addaudithook(refuse_sockets)
    sys.addaudithook(Watch(request))
    code = 1
    try:
        code = DOING[request["what"]](request)
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001, what Python itself does at the end of a process
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def command(request):
    """`arma ...`"""
    if not request["exchange"]:
        import arma_mergekit.merge.target

        arma_mergekit.merge.target.EXCHANGE = 1 << 30  # as on a filesystem that knows no such flag
    from arma_mergekit.cli import cli, run

    run(cli, "arma", request["args"])


def write_pair(request):
    """Models that have hardly learned anything, but not the same things, and a recipe to tune."""
    import torch
    import toy
    import transformers

    place, tokenizer = Path(request["args"][0]), toy.make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(toy.ALPHABET), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for side, texts in (("base", toy.sentences()), ("finetuned", [q + a for q, a in toy.sums()])):
        toy.train(model, texts, tokenizer, 12, 1e-2)
        toy.save(model, tokenizer, place / side)
    toy.write_data(place)
    evals = {"general": [{"kl": {"data": "general.jsonl"}}], "domain": [{"nll": {"data": "sums.jsonl"}}]}
    sides = {"base_model": str(place / "base"), "models": [{"model": str(place / "finetuned")}]}
    (place / "recipe.yml").write_text(json.dumps({"merge_method": "arma", "evals": evals} | sides))
    return 0


DOING = {"command": command, "write_pair": write_pair}


def serve(modules):
    """Requests from stdin, a line each; for each its process id, then how it ended."""
    for module in modules:
        __import__(module)
    gc.freeze()  # a collection would touch, and so copy, all memory in every child
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        since = time.monotonic()
        pid = os.fork()
        if pid == 0:
            run_request(json.loads(line))
        print(pid, file=answer)
        _, status, used = os.wait4(pid, 0)
        ended = [os.waitstatus_to_exitcode(status), time.monotonic() - since, used.ru_maxrss << 10]
        print(json.dumps(ended), file=answer)


# ---- in the process that tests ----


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``code`` (minus the signal if one killed it), what it printed, and its ``steps``.

    ``touched``: files that it made, changed or removed. ``peak``: bytes resident.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    steps: tuple[str, ...]
    touched: frozenset[Path]

    @property
    def said(self):
        """All of it."""
        return self.out + self.err

    def strange(self):
        """What it touched outside of devices and the cache."""
        usual = (Path("/dev"), Path(os.environ["ARMA_CACHE"]))
        return [p for p in self.touched if not any(p.is_relative_to(place) for place in usual)]


class Running:
    """A command under way."""

    def __init__(self, server, scratch, limits):
        self._server, self._scratch, self._limits = server, scratch, limits
        self.pid = int(server.stdout.readline())

    def send(self, number):
        """A signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self):
        """How it ends; AssertionError if it hangs, grows too large, or ends with a traceback or warning of Python."""
        seconds, most = self._limits
        alarm = threading.Timer(seconds, self.send, [signal.SIGKILL])
        alarm.start()
        code, took, peak = json.loads(self._server.stdout.readline())
        alarm.cancel()
        out, err = ((self._scratch / n).read_text(errors="backslashreplace") for n in ("out", "err"))
        lines = (self._scratch / "log").read_text().split("\n")[:-1]  # what has no end of line was cut
        log = [json.loads(line) for line in lines]
        steps = tuple(" ".join(entry[2:]) for entry in log if entry[0])
        touched = frozenset(Path(p) for entry in log if entry[1] for p in entry[3:])
        assert took < seconds, f"{took:.1f} s: {err}"
        assert peak < most, f"{peak:,} bytes resident: {err}"
        assert not re.search(r"Traceback|\w+Warning:", err), err
        return Outcome(code, out, err, took, peak, steps, touched)


class Lab:
    """Runs commands, of which none may take longer than ``seconds`` or more than ``peak`` bytes of memory.

    ``scratch``: a directory for what they print; ``modules``: imported once for all.
    """

    def __init__(self, scratch, modules=LIGHT, seconds=SECONDS, peak=BYTES):
        self._scratch, self._limits, self._count = scratch, (seconds, peak), 0
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *args, what="command", cwd=None, at=-1, harm=None, exchange=True, **limits):
        """Start `arma ...`, or ``what`` else of DOING; ``limits`` as RLIMIT_FSIZE=1000.

        ``harm`` is done before step number ``at``. Without ``exchange`` two directories cannot be swapped at once, as
        on some filesystems.
        """
        self._count += 1
        place = self._scratch / str(self._count)
        place.mkdir()
        cwd = str(cwd or self._scratch)
        files = {name: str(place / name) for name in ("out", "err", "log")}
        for name in files:
            (place / name).touch()  # a signal may come before the process has opened any
        how = {"cwd": cwd, "root": cwd, "at": at, "harm": harm, "exchange": exchange, "limits": limits}
        request = {"what": what, "args": [str(a) for a in args], **files, **how}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Running(self._server, place, self._limits)

    def run(self, *args, **options):
        """Start it and wait for its end."""
        return self.start(*args, **options).wait()

    def close(self):
        """End the server."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def contents(directory):
    """Every file below a directory and its bytes; None if it is not there."""
    if not directory.is_dir():
        return None
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def flip(file, at, bit=0):
    """Turn over one bit of a file; a negative ``at`` counts from its end."""
    with file.open("r+b") as stream:
        stream.seek(at, 2 if at < 0 else 0)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ (1 << bit)]))


if __name__ == "__main__":
    serve(sys.argv[1:])
