"""The inputs that the benchmarks share."""
import os
import subprocess
import sys

SIZE_MIB = 5120
CONTENT_MIB = 2560
CONVERT = ["qemu-img", "convert", "-O", "qcow2", "-W", "-m", "16"]
# The command that makes each image from disk.raw.
IMAGES = {
    "plain.qcow2": CONVERT,
    "deflate.qcow2": [*CONVERT, "-c"],
    "zstd.qcow2": [*CONVERT, "-c", "-o", "compression_type=zstd"],
}


def sh(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_images(directory, names, size_mib=SIZE_MIB, content_mib=CONTENT_MIB):
    """Makes an ext4 file system with real files, as disk.raw and as each of `names`. Keeps files that exist. Returns a
    function that returns the path of a file in `directory`."""
    os.makedirs(directory, exist_ok=True)
    here = os.path.dirname(os.path.abspath(__file__))
    path = lambda name: os.path.join(directory, name)

    def make_once(name, make):
        if os.path.exists(path(name)):
            return
        print(f"making {name} ...", file=sys.stderr)
        make(path(name + ".new"))
        os.rename(path(name + ".new"), path(name))

    make_once("disk.raw", lambda new: sh(os.path.join(here, "../scripts/make-fs-image"), new, str(size_mib), str(content_mib)))
    for name in names:
        make_once(name, lambda new: sh(*IMAGES[name], path("disk.raw"), new))
    return path
