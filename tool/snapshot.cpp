// qcow snapshot: lists the internal snapshots of an image.

#include "command.h"
#include "describe.h"

namespace tool {
namespace {

struct Options {
    Source source;
    bool list = false;
    bool json = false;
};

qcow::Result<int> run(const Options& options) {
    auto image = open_source(options.source, false);
    if (!image) return std::unexpected(std::move(image).error());
    const auto info = (*image)->info();
    if (!info) return std::unexpected(info.error());
    if (info->snapshots_error) return std::unexpected(*info->snapshots_error);
    if (options.json) {
        print_json(snapshots_json(*info));
    } else {
        print_snapshots(*info);
    }
    return ok;
}

}  // namespace

void declare_snapshot(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(root, status, "snapshot", "List the internal snapshots of an image",
                        "Examples:\n"
                        "  qcow snapshot --list disk.qcow2\n"
                        "  qcow convert -l NAME disk.qcow2 old.raw   copy the contents of a snapshot",
                        [options] { return run(*options); });
    add_source_options(app, options->source);
    app.add_flag("-l,--list", options->list, "List the id, name, date and sizes of each snapshot (the default)");
    app.add_flag("--json", options->json, "Print JSON");
}

}  // namespace tool
