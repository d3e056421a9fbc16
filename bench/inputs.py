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


def make_random_images(directory, size_mib):
    """Makes data.raw, which is all random data, and data.qcow2 with the same contents. Keeps a data.raw of this size.
    Returns whether it made them."""
    raw, qcow2 = (os.path.join(directory, "data." + suffix) for suffix in ("raw", "qcow2"))
    if os.path.exists(raw) and os.path.getsize(raw) == size_mib << 20:
        return False
    print("making data.raw ...", file=sys.stderr)
    with open("/dev/urandom", "rb") as random, open(raw, "wb") as file:
        for _ in range(size_mib):
            file.write(random.read(1 << 20))
    sh("qemu-img", "convert", "-O", "qcow2", raw, qcow2)
    return True


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
