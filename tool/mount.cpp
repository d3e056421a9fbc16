// qcow mount: shows an image as files.

#include "qcow/mount.h"

#include <fmt/format.h>

#include <cstdio>
#include <filesystem>

#include "command.h"
#include "qcow/text.h"
#include "sandbox.h"
#include "service.h"
#include "unmounter.h"

namespace tool {
namespace {

struct MountOptions {
    Source source;
    std::string target;
    std::string pid_file;
    std::string cache = "writeback";
    std::string discard = "unmap";
    unsigned threads = 0;
    bool read_only = false;
    bool allow_other = false;
    Sandbox sandbox;
};

bool only_reads(const MountOptions& options) { return options.read_only || !options.source.snapshot.empty(); }

qcow::Result<qcow::ImageSpec> mounted_spec(const MountOptions& options) {
    auto spec = QCOW_TRY(spec_of(options.source));
    if (!only_reads(options)) {
        set_cache(spec, options.cache);
        spec.write->discard = options.discard == "unmap";
    }
    return spec;
}

/// Confines the process, when everything is open.
qcow::Result<void> confine(const MountOptions& options) {
    auto sandbox = options.sandbox;
    if (!options.pid_file.empty()) sandbox.removed.push_back(options.pid_file);
    complain("sandbox: " + QCOW_TRY(enter_sandbox(sandbox)));
    return {};
}

qcow::Result<int> run(const MountOptions& options) {
    if (options.source.force_share && !only_reads(options)) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option --force-share",
                                           "two writers destroy an image; add --read-only or --snapshot"});
    }
    const auto spec = QCOW_TRY(mounted_spec(options));
    const auto image = QCOW_TRY(open(spec));
    if (!options.pid_file.empty()) {
        QCOW_TRY_VOID(verify_names_a_file(options.pid_file));
        qcow::FilesInUse in_use;
        QCOW_TRY_VOID(in_use.add(qcow::FilesInUse::Use::read, *image, spec, "the image"));
        QCOW_TRY_VOID(in_use.add(qcow::FilesInUse::Use::written, options.pid_file, "the PID file"));
    }
    auto disk = QCOW_TRY(disk_of(image, options.source));
    // Here, and not with each request: an encrypted image cannot be read at all.
    QCOW_TRY_VOID(disk->read({0}, {}));
    const std::string target = std::filesystem::absolute(options.target);
    Unmounter unmounter;
    const auto mount =
        QCOW_TRY(qcow::Mount::make(std::move(disk), options.target,
                                   {.read_only = only_reads(options),
                                    .allow_other = options.allow_other,
                                    .threads = options.threads,
                                    .failed = [](const qcow::Error& error) { complain(error.message()); },
                                    .unmount = [&] { unmounter.unmount(target); }}));
    QCOW_TRY_VOID(unmounter.start(target));
    const StopServiceOnSignals signals([&] { mount->stop(); });
    PidFile pid_file;
    if (!options.pid_file.empty()) QCOW_TRY_VOID(pid_file.write(options.pid_file));
    const ServiceManager manager;
    QCOW_TRY_VOID(confine(options));
    fmt::print("mounted {} on {}\n", qcow::printable(options.source.path), qcow::printable(options.target));
    std::fflush(stdout);
    manager.tell("READY=1");
    auto result = mount->run();
    manager.tell("STOPPING=1");
    auto closed = image->close();
    if (result) result = std::move(closed);
    if (!result) return std::unexpected(std::move(result).error());
    return ok;
}

}  // namespace

void declare_mount(CLI::App& root, int& status) {
    const auto options = std::make_shared<MountOptions>();
    auto& app = declare(
        root, status, "mount", "Show the disk of an image as a file of this machine",
        "Mounts the image by FUSE, without root. It stays mounted until SIGTERM or SIGINT (Ctrl-C), or until somebody\n"
        "unmounts it (fusermount3 -u, or umount). Then everything is flushed, and the image is closed.\n"
        "\n"
        "On a file, that file becomes the disk, raw. What the file holds is hidden until the end. It may be the image\n"
        "itself. On an empty directory, these files appear:\n"
        "  disk               the disk\n"
        "  partitions/N       each partition\n"
        "  snapshots/NAME     each internal snapshot, read-only. In NAME, \"/\" is written as %2F, \"%\" as %25, and "
        "a\n"
        "                     leading \".\" as %2E\n"
        "\n"
        "The files behave like block devices. Their size is fixed: qcow resize changes it while the image is not\n"
        "mounted. Data are durable after fsync, not after close. fallocate makes holes and zeros, and SEEK_HOLE finds\n"
        "them. No other program may change the image meanwhile.\n"
        "\n"
        "The files have the owner and the permissions of the mount point. Without --allow-other, only the user who\n"
        "mounts can reach them, and not even root: a loop device needs a mount by root, or --allow-other.\n"
        "\n"
        "When the image is mounted, the process gives up the right to open files, make connections and run programs,\n"
        "as far as the system has Landlock and seccomp. It prints what is in force. Another process unmounts at the\n"
        "end, also if this one is killed. With --user, root switches to another user.\n"
        "\n"
        "Examples:\n"
        "  touch disk.raw; qcow mount disk.qcow2 disk.raw &\n"
        "  fdisk -l disk.raw\n"
        "  fusermount3 -u disk.raw\n"
        "  mkdir d; qcow mount --read-only disk.qcow2 d &\n"
        "  cmp d/snapshots/monday d/snapshots/tuesday",
        [options] { return run(*options); });
    add_source_options(app, options->source);
    app.add_option("FILE-OR-DIR", options->target, "Where to mount: a file, or an empty directory")
        ->required()
        ->check(name_text);
    add_snapshot_option(app, options->source, "Mount this internal snapshot (id or name), read-only");
    app.add_flag("-r,--read-only", options->read_only,
                 "Refuse writes. Other processes can read the image, too. --force-share needs this or --snapshot");
    app.add_flag("--allow-other", options->allow_other,
                 "Let all users reach the files, as far as the permissions allow. Users other than root need the line "
                 "user_allow_other in /etc/fuse.conf");
    app.add_option("--threads", options->threads,
                   "Threads that perform requests; 0: one per processor, and more if the disk is slow")
        ->type_name("NUMBER")
        ->check(whole_number(0, 64))
        ->capture_default_str();
    app.add_option("--pid-file", options->pid_file, "Write the process ID to this file when the image is mounted")
        ->type_name("FILE")
        ->check(name_text);
    add_sandbox_options(app, options->sandbox);
    add_cache_option(app, options->cache, "--cache")
        ->description(
            "When writes become durable. writeback: at fsync; writethrough: each one at once; none: at fsync, without "
            "the page cache for the image file (direct I/O); unsafe: not before the system writes them");
    one_of(app.add_option("--discard", options->discard,
                          "What holes are: unmap releases storage, ignore only makes the bytes zeros"),
           {"unmap", "ignore"})
        ->capture_default_str();
}

}  // namespace tool
