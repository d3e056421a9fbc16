// qcow rebase: another backing file.

#include "qcow/rebase.h"

#include "command.h"
#include "progress.h"

namespace tool {
namespace {

struct Options {
    Target target;
    std::string backing;
    std::string backing_format;
    bool unsafe = false;
    bool compress = false;
    bool progress = false;
    unsigned workers = 0;
};

qcow::Result<int> run(const Options& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    Progress progress("rebasing", options.progress);
    const qcow::RebaseJob job{
        .image = spec_of(options.target),
        .backing = options.backing,
        .backing_format = qcow::format_from_name(options.backing_format),
        .unsafe = options.unsafe,
        .compress = options.compress,
        .workers = options.workers,
    };
    QCOW_TRY(
        qcow::rebase(job, {.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); },
                           .warn = warn_on_stderr()}));
    return ok;
}

}  // namespace

void declare_rebase(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "rebase", "Change the backing file",
        "The contents of the disk stay the same: what the image takes from its old backing file, and what the new\n"
        "one has otherwise, is copied into the image first. A relative BACKING starts at the image's directory.\n"
        "If rebase is interrupted, the image has its contents all the same. Run it again.\n"
        "With -u only the name is changed, for a backing file that was moved: nothing is read or copied, and no\n"
        "backing file needs to exist. If the new one has other contents, the image is then damaged.\n"
        "Examples:\n"
        "  qcow rebase -b base-v2.qcow2 -F qcow2 disk.qcow2\n"
        "  qcow rebase -b '' disk.qcow2                            no backing file any more\n"
        "  qcow rebase -u -b /new/place/base.raw -F raw disk.qcow2",
        [options] { return run(*options); });
    add_target_options(app, options->target);
    app.add_option("-b,--backing", options->backing, "The new backing file; '' for none")
        ->type_name("FILE")
        ->required();
    one_of(app.add_option("-F,--backing-format", options->backing_format, "The format of the new backing file"),
           {"raw", "qcow", "qcow2"});
    app.add_flag("-u,--unsafe", options->unsafe, "Change the name only");
    app.add_flag("-c,--compress", options->compress, "Compress what is copied into the image");
    add_workers_option(app, options->workers);
    app.add_flag("-p,--progress", options->progress, "Show progress even where standard error is no terminal");
}

}  // namespace tool
