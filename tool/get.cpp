// qcow get: copies files out of the file system of a disk.

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>

#include "command.h"
#include "failure.h"
#include "inside.h"
#include "progress.h"
#include "qcow/text.h"
#include "signals.h"

namespace tool {
namespace {

struct GetOptions {
    DiskName disk;
    std::vector<std::string> paths;  // and the target, unless `tar`
    std::vector<std::uint64_t> inodes;
    bool tar = false;
    bool progress = false;
    unsigned workers = 0;
};

std::string last_name(std::string path) {
    while (path.ends_with('/')) path.pop_back();
    return path.substr(path.rfind('/') + 1);
}

bool is_directory(const std::string& path) {
    struct stat status = {};
    return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

/// The files in the disk. The root has no name.
qcow::Result<std::vector<qcow::ExtractItem>> items_of(Inside& inside, const GetOptions& options, std::size_t paths) {
    std::vector<qcow::ExtractItem> items;
    for (std::size_t i = 0; i < paths; ++i) {
        const auto& path = options.paths[i];
        auto name = last_name(path);
        if (name == "." || name == "..") name.clear();
        items.push_back({QCOW_TRY(find_shown_path(*inside.files, path, false)), name, path});
    }
    for (const auto inode : options.inodes) {
        const auto shown = fmt::format("inode-{}", inode);
        items.push_back({inode, shown, shown});
    }
    return items;
}

/// Returns the directory of this machine that items go to. A single item may get another name.
qcow::Result<std::string> target_of(const std::string& target, std::vector<qcow::ExtractItem>& items) {
    if (target == "-") {
        return refuse("-", "standard output takes no files; `qcow cat` writes one to it, and --tar an archive");
    }
    if (is_directory(target)) return target;
    if (items.size() > 1 || target.ends_with('/'))
        return refuse(qcow::printable(target), "there is no such directory; make it first");
    if (items.front().name.empty()) {
        // A whole file system becomes a new directory.
        if (mkdir(target.c_str(), 0777) != 0) return refuse(qcow::printable(target), "cannot make this directory");
        return target;
    }
    const auto slash = target.rfind('/');
    items.front().name = target.substr(slash + 1);
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : target.substr(0, slash);
}

qcow::Result<int> run(const GetOptions& options) {
    if (!options.tar && options.paths.empty()) return refuse("TARGET", "name where the files go, or give --tar");
    const std::size_t paths = options.paths.size() - (options.tar ? 0 : 1);
    if (paths == 0 && options.inodes.empty())
        return refuse("get", "name a file in the disk and a target, or give --inode");
    auto inside = QCOW_TRY(open_inside(options.disk));
    auto items = QCOW_TRY(items_of(inside, options, paths));
    std::string target;
    if (options.tar) {
        if (isatty(STDOUT_FILENO) != 0) {
            return refuse("standard output",
                          "is a terminal, which is no place for an archive; lead the output into a file");
        }
        qcow::FilesInUse in_use;
        using enum qcow::FilesInUse::Use;
        QCOW_TRY_VOID(in_use.add(read, *inside.image, QCOW_TRY(spec_of(options.disk.source)), "the image"));
        QCOW_TRY_VOID(in_use.add(written, "/dev/stdout", "standard output"));
    } else {
        target = QCOW_TRY(target_of(options.paths.back(), items));
    }

    qcow::ExtractReport report;
    {
        Progress progress("getting", options.progress);
        const CleanUpOnSignals clean_up;
        const auto info = inside.files->info();
        const auto total = info ? info->bytes - std::min(info->bytes, info->free_bytes.value_or(0)) : 0;
        qcow::ExtractOptions how;
        how.disk = inside.disk.get();
        how.workers = options.workers;
        how.failed = complain_about;
        how.progress = [&](std::uint64_t bytes) { progress.update(std::min(bytes, total), total); };
        report = QCOW_TRY(options.tar ? qcow::write_tar(*inside.files, items, STDOUT_FILENO, how)
                                      : qcow::extract(*inside.files, items, target, how));
    }
    if (!report.not_kept.empty()) {
        complain(fmt::format("warning: this user may not set, or the target does not have: {}",
                             fmt::join(report.not_kept, ", ")));
    }
    return report.failed == 0 ? ok : failed;
}

}  // namespace

void declare_get(CLI::App& root, int& status) {
    const auto options = std::make_shared<GetOptions>();
    auto& app = declare(
        root, status, "get", "Copy files and directories out of the file system of a disk",
        "Keeps owners, modes, times, hard and symbolic links, holes, device nodes and extended attributes, as far as "
        "the\n"
        "user may set them. Nothing that exists is replaced, and nothing outside of TARGET is touched, whatever names\n"
        "and links the disk has. If TARGET is a directory, the files go into it.\n"
        "Examples:\n"
        "  qcow get disk.qcow2:2 /etc/fstab .\n"
        "  qcow get disk.qcow2:2 / tree                       the whole file system\n"
        "  qcow get --tar disk.qcow2:2 /var /home | zstd > data.tar.zst\n"
        "  qcow get --inode 1234 disk.qcow2:2 .               as inode-1234",
        [options] { return run(*options); });
    add_disk_options(app, options->disk);
    add_checksum_option(app, options->disk);
    app.add_option("PATH", options->paths, "Files in the disk, and at last TARGET, where they go")->expected(0, -1);
    app.add_option("--inode", options->inodes, "Get the file with this inode number, also one that was deleted")
        ->type_name("NUMBER")
        ->allow_extra_args(false);
    app.add_flag("--tar", options->tar, "Write a tar archive to standard output, without TARGET");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    add_workers_option(app, options->workers);
}

}  // namespace tool
