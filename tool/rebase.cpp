// qcow rebase: changes the backing file of an image.

#include "qcow/rebase.h"

#include "command.h"
#include "progress.h"

namespace tool {
namespace {

struct RebaseOptions {
    Target target;
    std::string backing;
    std::string backing_format;
    bool unsafe = false;
    bool compress = false;
    bool progress = false;
    unsigned workers = 0;
};

qcow::Result<int> run(const RebaseOptions& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    const StopOnSignals signals;
    Progress progress("rebasing", options.progress);
    const qcow::RebaseJob job{
        .image = QCOW_TRY(spec_of(options.target)),
        .backing = options.backing,
        .backing_format = qcow::format_from_name(options.backing_format),
        .unsafe = options.unsafe,
        .compress = options.compress,
        .workers = options.workers,
    };
    QCOW_TRY(
        qcow::rebase(job, {.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); },
                           .warn = warn_on_stderr(),
                           .stop = signals.token()}));
    return ok;
}

}  // namespace

void declare_rebase(CLI::App& root, int& status) {
    const auto options = std::make_shared<RebaseOptions>();
    auto& app = declare(
        root, status, "rebase", "Change the backing file of an image",
        "The contents of the disk stay the same: rebase first copies the data that differ between the old and the new\n"
        "backing file into the image. If it is interrupted, contents and bitmaps are still the same; run it again.\n"
        "With -u, rebase only records the new name, for a backing file that was moved. Neither backing file needs to\n"
        "exist. If their contents differ, so do the contents of the disk afterwards.\n"
        "Keys of encrypted images (--key) are taken for the new backing file first, then for the image and its chain.\n"
        "Internal snapshots that read data from the backing file change; rebase warns of them.\n"
        "Examples:\n"
        "  qcow rebase -b base-v2.qcow2 -F qcow2 disk.qcow2\n"
        "  qcow rebase -b '' disk.qcow2                            remove the backing file\n"
        "  qcow rebase -u -b /new/place/base.raw -F raw disk.qcow2",
        [options] { return run(*options); });
    add_target_options(app, options->target);
    app.add_option("-b,--backing", options->backing,
                   "New backing file; '' for none. A relative path starts at the directory of IMAGE")
        ->type_name("FILE")
        ->required();
    one_of(app.add_option("-F,--backing-format", options->backing_format, "Format of the new backing file"),
           {"raw", "qcow", "qcow2", "luks"});
    app.add_flag("-u,--unsafe", options->unsafe, "Only record the new name; do not compare or copy data");
    app.add_flag("-c,--compress", options->compress, "Compress the data that are copied into the image");
    add_workers_option(app, options->workers);
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
}

}  // namespace tool
