"""Does to searches what machines do, and checks that they end as one that was left alone: bit-identical.

    python binaries/tools/faults.py                       # all; the table of docs/reliability.md
    python binaries/tools/faults.py --kills=2 --only=kill,preemption

The search is that of `binaries/search.py` on the digits with a network of two layers; its processes are forked from
one that has imported TensorFlow, so that each takes seconds. "The same bits" means: the last checkpoint (weights,
optimizer, controller, activation ranges) byte for byte, every array of model.keras, and the recipe. What needs a file
system of its own needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from binaries.tools import fault_worker

SECONDS = 600  # no run takes longer, or it hangs
# (moment, number of the checkpoint write)
WRITES = [("first_half", 2), ("written", 3), ("synced", 5), ("renamed", 6), ("first_half", 9), ("written", 12)]


class Trial:
    """One run directory, and the processes that work on it."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def start(self, *flags, fault: str = "none", at: int = 0, resume: bool = False, **environment):
        """Starts the search."""
        flags = [f"--run_dir={self.path}", *flags, *(["--resume"] if resume else [])]
        if not environment:
            return Forked(lambda: fault_worker.run(fault, at, flags))
        command = [sys.executable, "-m", "binaries.tools.fault_worker", fault, str(at), *flags]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *flags, **options) -> tuple[int, str]:
        """Status and output of the search."""
        return finished(self.start(*flags, **options))

    def checkpoint_step(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        names = [p.name for p in (self.path / "checkpoints").glob("step-*.ckpt")]
        return max((int(name[5:-5]) for name in names), default=0)

    def results(self) -> dict[str, bytes]:
        """What must be the same bits."""
        import h5py

        found = {"checkpoint": (self.path / "checkpoints" / f"step-{fault_worker.STEPS:08d}.ckpt").read_bytes()}
        found["recipe"] = json.dumps(json.loads((self.path / "recipe.json").read_text())["formats"]).encode()
        with zipfile.ZipFile(self.path / "model.keras") as archive:
            weights = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
        weights.visititems(lambda n, v: found.update({n: v[()].tobytes()}) if isinstance(v, h5py.Dataset) else None)
        return found


class Forked:
    """A process forked from this one; what it has in common with `subprocess.Popen`."""

    def __init__(self, run):
        self.returncode = None
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as this object
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        for stream in (1, 2):
            os.dup2(self._output.fileno(), stream)
        status = 1
        try:
            run()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self):
        """Its status, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self):
        """SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def terminate(self):
        """SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def communicate(self, timeout=None):
        """Waits for its end, and gives its output."""
        deadline = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("search", timeout)
            time.sleep(0.01)
        self._output.seek(0)
        return self._output.read(), None


def finished(process) -> tuple[int, str]:
    """Status and output of a process; a hung one is an error."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return 124, f"hung: did not end within {SECONDS} s\n" + process.communicate()[0]
    return process.returncode, output


def last_line(output: str) -> str:
    """The message that a program ends with."""
    noise = ("I0000", "W0000", "E0000", "WARNING: All log", "epoch ", "  warnings.warn", "  self.")
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(noise)]
    return lines[-1].strip()[:200] if lines else ""


class Faults:
    """The trials, each of which returns rows of the table: (fault, what the program did, same bits of how many)."""

    def __init__(self, directory: pathlib.Path, seed: int):
        self.directory, self.random = directory, random.Random(seed)
        self.count = 0
        importlib.import_module("binaries.search")  # not more than import: no device is in use when processes fork
        begin = time.monotonic()
        reference = self.trial()
        status, output = reference.run()
        if status:
            sys.exit(f"The undisturbed run failed:\n{output}")
        self.seconds, self.expected = time.monotonic() - begin, reference.results()
        print(f"An undisturbed run takes {self.seconds:.0f} s.", flush=True)

    def trial(self, directory: pathlib.Path | None = None) -> Trial:
        """A new run directory."""
        self.count += 1
        return Trial((directory or self.directory) / f"run{self.count}")

    def same(self, trial: Trial, **options) -> bool:
        """Goes on to the end; whether that is the same to the bit."""
        resume = (trial.path / "flags.json").exists()
        if not resume:  # it was killed before it had begun
            shutil.rmtree(trial.path, ignore_errors=True)
        status, output = trial.run(resume=resume, **options)
        if status:
            print(output[-3000:], flush=True)
            return False
        found = trial.results()
        different = [name for name in self.expected if found.get(name) != self.expected[name]]
        if different:
            print(f"{trial.path} differs in {', '.join(different)}", flush=True)
        shutil.rmtree(trial.path, ignore_errors=True)
        return not different

    def kill(self, kills: int):
        """SIGKILL at random moments, and inside of checkpoint writes."""
        inside = WRITES[: max(1, kills * 3 // 10)]
        every, same = [], 0
        while len(every) < kills - len(inside):
            # Killed again and again until nothing is left to train.
            trial, steps = self.trial(), []
            while len(every) + len(steps) < kills - len(inside) and fault_worker.STEPS not in steps:
                began = (trial.path / "flags.json").exists()
                if not began:
                    shutil.rmtree(trial.path, ignore_errors=True)
                process = trial.start(resume=began)
                self._wait(trial, process)
                if process.poll() is not None:  # it was done already: no kill
                    break
                process.kill()
                finished(process)
                steps.append(trial.checkpoint_step())
            every += steps
            same += len(steps) * (bool(steps) and self.same(trial))
            print(f"killed with checkpoints of steps {_spread(steps)}: {same} of {len(every)} the same", flush=True)
        yield "SIGKILL at random moments", f"newest checkpoints then: {_spread(every)}", same, len(every)
        same = 0
        for moment, number in inside:
            trial = self.trial()
            status, _ = trial.run(fault=moment, at=number)
            same += status == -signal.SIGKILL and self.same(trial)
        yield "SIGKILL inside a checkpoint write", ", ".join(sorted({m for m, _ in inside})), same, len(inside)

    def _wait(self, trial, process):
        """Until a random moment: of the whole run, or, as most of it is start-up, soon after a random checkpoint."""
        if self.random.random() < 0.3:
            time.sleep(self.random.uniform(0, 1) * self.seconds)
            return
        now = trial.checkpoint_step()
        step = self.random.randrange(now, min(now + 25, fault_worker.STEPS + 1))
        while trial.checkpoint_step() < step and process.poll() is None:
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.05))  # a few steps

    def preemption(self, kills: int):
        """SIGTERM while it trains."""
        trial = self.trial()
        process = trial.start()
        while not trial.checkpoint_step() and process.poll() is None:
            time.sleep(0.02)
        process.terminate()
        begin = time.monotonic()
        status, output = finished(process)
        took = f"status {status} after {time.monotonic() - begin:.1f} s, checkpoint of step {trial.checkpoint_step()}"
        yield "SIGTERM", f"{took}: {last_line(output)}", status == 75 and self.same(trial), 1

    def damage(self, kills: int):
        """A byte of the newest checkpoint is not what it was."""
        trial = self.trial()
        trial.run(fault="renamed", at=4)
        newest = sorted((trial.path / "checkpoints").glob("step-*.ckpt"))[-1]
        content = bytearray(newest.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        newest.write_bytes(content)
        status, output = trial.run(resume=True)
        warned = next((line for line in output.splitlines() if "damaged" in line), "no warning")
        same = status == 0 and trial.results() == self.expected
        yield "one bit of the newest checkpoint flipped", warned.replace(str(newest), newest.name), same, 1

    def data(self, kills: int):
        """The data pipeline raises."""
        trial = self.trial()
        status, output = trial.run(fault="data", at=33)
        step = trial.checkpoint_step()
        message = "bad record" in output
        yield (
            "data pipeline raises at step 33",
            f"status {status}, message {'shown' if message else 'lost'}, checkpoint of step {step}",
            status not in (0, 124) and message and step == 30 and self.same(trial),
            1,
        )

    def gradient(self, kills: int):
        """The gradients are NaN at a step whose loss is finite; a checkpoint is due right after it."""
        trial = self.trial()
        status, output = trial.run(fault="gradient", at=34)
        step = trial.checkpoint_step()
        message = next((line for line in output.splitlines() if "not finite at step" in line), last_line(output))
        ok = status not in (0, 124) and "not finite at step 35" in message and step == 30
        yield (
            "NaN gradients at step 34",
            f"status {status}, checkpoint of step {step}: {message}",
            ok and self.same(trial),
            1,
        )

    def two(self, kills: int):
        """Two processes on one run directory."""
        trial = self.trial()
        first = trial.start()
        while not (trial.path / "flags.json").exists() and first.poll() is None:
            time.sleep(0.02)
        status, output = trial.run(resume=True)
        other, _ = finished(first)
        same = status not in (0, 124) and other == 0 and trial.results() == self.expected
        yield "second process on a run directory", f"status {status}: {last_line(output)}", same, 1

    def disk(self, kills: int):
        """No space left, and a directory that cannot be written."""
        mount = self.directory / "small"
        mount.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], stderr=subprocess.PIPE).returncode:
            yield "full disk", "not tried: to mount a file system needs root", 0, 0
            return
        try:
            trial = self.trial(mount)
            filler = mount / "filler"
            process = trial.start()
            while trial.checkpoint_step() < 10 and process.poll() is None:
                time.sleep(0.01)
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            status, output = finished(process)
            step = trial.checkpoint_step()
            filler.unlink()
            yield (
                "full disk",
                f"status {status}, checkpoint of step {step}: {last_line(output)}",
                status not in (0, 124) and self.same(trial),
                1,
            )
            subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
            status, output = self.trial(mount).run()
            yield "read-only run directory", f"status {status}: {last_line(output)}", status not in (0, 124), 1
        finally:
            subprocess.run(["umount", mount], check=False)

    def lost(self, kills: int):
        """One of two workers is killed (tf_keras)."""
        whole, trial = self.trial(), self.trial()
        if any(status for status, _ in map(finished, _pair(whole))):
            yield "lost worker", "two workers do not run here", False, 1
            return
        expected = whole.results()
        chief, other = _pair(trial)
        while trial.checkpoint_step() < 20 and chief.poll() is None:
            time.sleep(0.02)
        other.kill()
        begin = time.monotonic()
        finished(other)
        status, _ = finished(chief)
        took = time.monotonic() - begin
        ended = [s for s, _ in map(finished, _pair(trial, resume=True))]
        # Each worker has moving averages of its own; a checkpoint holds their mean, which the last one shows.
        found = {**trial.results(), "checkpoint": expected["checkpoint"]} if not any(ended) else {}
        same = status not in (0, 124) and found == expected
        yield "one of two workers killed", f"the other: status {status} after {took:.0f} s", same, 1


def _pair(trial: Trial, **options) -> list[subprocess.Popen]:
    """Two workers on this machine."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("localhost", 0)), two.bind(("localhost", 0))
        hosts = [f"localhost:{s.getsockname()[1]}" for s in (one, two)]
    configs = [{"cluster": {"worker": hosts}, "task": {"type": "worker", "index": i}} for i in range(2)]
    return [
        trial.start("--strategy=multiworker", TF_USE_LEGACY_KERAS="1", TF_CONFIG=json.dumps(config), **options)
        for config in configs
    ]


def _spread(steps: list[int]) -> str:
    return ", ".join("none" if step == 0 else str(step) for step in sorted(steps))


NAMES = ("kill", "preemption", "damage", "data", "gradient", "two", "disk", "lost")


def main() -> None:
    """Runs the faults and prints the table; the exit status says whether all ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many SIGKILLs")
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"unknown faults {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        faults = Faults(pathlib.Path(directory), arguments.seed)
        for name in arguments.only.split(","):
            for fault, did, same, times in getattr(faults, name)(arguments.kills):
                did = did.replace(directory, "RUNS")
                rows.append((fault, did, int(same), times))
                print(f"| {fault} | {did} | {int(same)} of {times} |", flush=True)
    print("\n| fault | what happened | resumed to the same bits |\n|---|---|---|")
    for fault, did, same, times in rows:
        print(f"| {fault} | {did} | {f'{same} of {times}' if times else '-'} |")
    sys.exit(any(same < times for _, _, same, times in rows))


if __name__ == "__main__":
    main()
