// qcow commit: writes the contents of an image into a layer below it.

#include "qcow/commit.h"

#include "command.h"
#include "progress.h"

namespace tool {
namespace {

struct CommitOptions {
    Target target;
    std::string base;
    bool keep = false;
    bool progress = false;
    unsigned workers = 0;
};

qcow::Result<int> run(const CommitOptions& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    const StopOnSignals signals;
    Progress progress("committing", options.progress);
    const qcow::CommitJob job{
        .image = QCOW_TRY(spec_of(options.target)),
        .base = options.base,
        .keep = options.keep,
        .workers = options.workers,
    };
    QCOW_TRY(
        qcow::commit(job, {.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); },
                           .warn = warn_on_stderr(),
                           .stop = signals.token()}));
    return ok;
}

}  // namespace

void declare_commit(CLI::App& root, int& status) {
    const auto options = std::make_shared<CommitOptions>();
    auto& app = declare(
        root, status, "commit", "Write the contents of an image into its backing file",
        "The contents of the disk stay the same: commit writes what IMAGE stores into its backing file, and then\n"
        "empties IMAGE. If it is interrupted, the contents are still the same; run it again.\n"
        "With -b, the data go down several layers at once, and IMAGE gets BASE as its backing file. The layers in\n"
        "between, and all other overlays of BASE, are not valid afterwards: delete them.\n"
        "A smaller backing file grows to the size of IMAGE. A larger one keeps its size.\n"
        "Examples:\n"
        "  qcow commit overlay.qcow2\n"
        "  qcow commit -b base.qcow2 overlay.qcow2  write into a layer further down\n"
        "  qcow commit -d overlay.qcow2             leave overlay.qcow2 as it is",
        [options] { return run(*options); });
    add_target_options(app, options->target);
    app.add_option("-b,--base", options->base,
                   "Layer of the backing chain that gets the contents (default: the backing file of IMAGE)")
        ->type_name("BASE")
        ->check(name_text);
    app.add_flag("-d,--keep", options->keep, "Leave IMAGE as it is; do not empty it");
    add_workers_option(app, options->workers);
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
}

}  // namespace tool
