"""Servers that take turns, and the table of their figures."""
import atexit
import json
import os
import statistics
import subprocess
import sys
import time

from inputs import make_random_images, sh

PEAK_GOAL_MIB = 128
SECRET = ["--object", "secret,id=s,data=x"]
LUKS = [*SECRET, "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"]


class Server:
    """A running server. stop() sets `peak`, its largest size in KiB, and `cpu`, its processor seconds."""

    def __init__(self, command, socket, pid):
        """Starts a command that listens on `socket` and then writes the file `pid`."""
        for file in (socket, pid):
            if os.path.exists(file):
                os.unlink(file)
        self.log = socket + ".log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stderr=log)
        atexit.register(self.process.kill)  # a benchmark that fails leaves no server behind
        while not os.path.exists(pid):
            if self.process.poll() is not None:
                sys.exit(f"server did not start: {' '.join(command)}\n{self.said()}")
            time.sleep(0.01)

    def said(self):
        with open(self.log) as log:
            return log.read()

    def stop(self):
        self.process.terminate()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode != 0:
            sys.exit(f"server ended with an error: {' '.join(self.process.args)}\n{self.said()}")
        self.peak = usage.ru_maxrss
        self.cpu = usage.ru_utime + usage.ru_stime


def uri(socket):
    return f"nbd+unix:///?socket={socket}"


def fio(socket, options, size_mib, connections, seconds):
    """Returns operations and bytes per second of one run."""
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri(socket)}", "--thread", "--group_reporting",
               "--randrepeat=0", "--norandommap", "--time_based", f"--runtime={seconds}", f"--numjobs={connections}",
               f"--size={size_mib}m", "--output-format=json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    return (sum(job[way]["iops"] for way in ("read", "write")), sum(job[way]["bw_bytes"] for way in ("read", "write")))


def contest(contestants, rounds):
    """Returns the figures of each contestant in each round, and the peak of those of qcow in KiB. contestants[name]()
    measures once, and returns a figure and a peak."""
    figures = {name: [] for name in contestants}
    peak = 0
    for turn in range(rounds):
        order = list(contestants)
        order = order[turn % len(order):] + order[:turn % len(order)]  # each is first in turn
        for name in order:
            figure, its_peak = contestants[name]()
            figures[name].append(figure)
            if name.startswith("qcow"):
                peak = max(peak, its_peak)
    return figures, peak


class Table:
    """Prints a line for each case. `ratios` are pairs of contestants, with a heading each."""

    def __init__(self, parameter, contestants, ratios):
        self.parameter = parameter
        self.contestants = contestants
        self.ratios = ratios
        self.results = []
        print(f"{'CASE':<40}{parameter.upper():>13}" + "".join(f"{name.upper():>16}" for name in contestants)
              + "".join(f"{heading:>18}" for _, _, heading in ratios) + f"{'PEAK':>10}")

    def add(self, name, parameter, figures, goals, peak, show):
        """`goals`: for each of the ratios, None without one. Ratios of contestants without figures stay empty."""
        median = {contestant: statistics.median(samples) for contestant, samples in figures.items()}
        line = f"{name:<40}{parameter or '':>13}"
        line += "".join(f"{show(median[contestant]) if contestant in median else '':>16}" for contestant in self.contestants)
        ratios = {}
        for (ours, theirs, _), goal in zip(self.ratios, goals):
            text = ""
            if goal and ours in figures and theirs in figures:
                ratio = statistics.median(a / b for a, b in zip(figures[ours], figures[theirs]))
                ratios[f"{ours} / {theirs}"] = {"ratio": ratio, "goal": goal}
                text = f"{ratio:.2f}{'!' if ratio < goal else ' '} ({goal})"
            line += f"{text:>18}"
        print(line + f"{peak / 1024:>5.0f} MiB{'!' if peak > PEAK_GOAL_MIB * 1024 else ''}", flush=True)
        self.results.append({"case": name, self.parameter: parameter, "medians": median, "figures": figures, "ratios": ratios, "peak_kib": peak})

    def save(self, path, **about):
        """Writes all figures, and what is said about them, to the file `path`."""
        with open(path, "w") as file:
            json.dump({**about, "processors": os.cpu_count(), "results": self.results}, file, indent=2)


def rate(value):
    return f"{value:,.0f}/s"


def throughput(value):
    return f"{value / 1e9:.2f} GB/s"


def make_data(path, size_mib, qcow):
    """Makes data.raw, data.qcow2 and data.encrypted, images that are all data."""
    if make_random_images(path(""), size_mib):
        sh(qcow, "convert", "-O", "qcow2", *LUKS, path("data.raw"), path("data.encrypted"))
