// qcow snapshot: lists, makes, applies, removes and renames the internal snapshots of an image.

#include "command.h"
#include "describe.h"

namespace tool {
namespace {

struct Options {
    Source source;
    bool list = false;
    std::string create;
    std::string apply;
    std::string remove;
    std::vector<std::string> rename;
    bool json = false;
    [[nodiscard]] bool changes() const {
        return !create.empty() || !apply.empty() || !remove.empty() || !rename.empty();
    }
};

qcow::Result<int> list(const Options& options) {
    const auto image = QCOW_TRY(open_source(options.source, false));
    const auto info = QCOW_TRY(image->info());
    if (info.snapshots_error) return std::unexpected(*info.snapshots_error);
    if (options.json) {
        print_json(snapshots_json(info));
    } else {
        print_snapshots(info);
    }
    return ok;
}

qcow::Result<void> change(qcow::Snapshots snapshots, const Options& options) {
    if (!options.apply.empty()) return snapshots.apply(options.apply);
    if (!options.remove.empty()) return snapshots.remove(options.remove);
    if (!options.rename.empty()) return snapshots.rename(options.rename[0], options.rename[1]);
    QCOW_TRY(snapshots.create(options.create));
    return {};
}

qcow::Result<int> run(const Options& options) {
    if (!options.changes()) return list(options);
    if (options.source.force_share) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option --force-share",
                                           "works only with --list: two programs that write to an image destroy it"});
    }
    auto spec = QCOW_TRY(spec_of(options.source));
    spec.write.emplace();
    const auto image = QCOW_TRY(open(spec));
    QCOW_TRY_VOID(change(image->snapshots(), options));
    QCOW_TRY_VOID(image->close());
    return ok;
}

}  // namespace

void declare_snapshot(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "snapshot", "List, make, apply, remove or rename the internal snapshots of an image",
        "A snapshot keeps the contents of the disk within the image. It is found by its id, else by its name. A crash\n"
        "leaves the image as it was before or as it is after the change.\n"
        "Examples:\n"
        "  qcow snapshot -l disk.qcow2\n"
        "  qcow snapshot -c before-upgrade disk.qcow2\n"
        "  qcow snapshot -a before-upgrade disk.qcow2       the present contents of the disk are lost\n"
        "  qcow snapshot -d before-upgrade disk.qcow2\n"
        "  qcow snapshot --rename 1 monday disk.qcow2\n"
        "  qcow convert -l NAME disk.qcow2 old.raw          copy the contents of a snapshot",
        [options] { return run(*options); });
    add_source_options(app, options->source);
    auto* list =
        app.add_flag("-l,--list", options->list, "List the id, name, date and sizes of each snapshot (the default)");
    auto* create = app.add_option("-c,--create", options->create, "Make a snapshot of the disk")->type_name("NAME");
    auto* apply = app.add_option("-a,--apply", options->apply,
                                 "Make the disk what it was when this snapshot was made, and as large")
                      ->type_name("SNAPSHOT");
    auto* remove = app.add_option("-d,--delete", options->remove, "Remove this snapshot")->type_name("SNAPSHOT");
    auto* rename = app.add_option("--rename", options->rename, "Give this snapshot another name")
                       ->type_name("SNAPSHOT NAME")
                       ->expected(2);
    const std::vector<CLI::Option*> actions{list, create, apply, remove, rename};
    for (auto* one : actions) {
        if (one != list) one->check(name_text);
        for (auto* other : actions) {
            if (one != other) one->excludes(other);
        }
    }
    app.add_flag("--json", options->json, "Print JSON")
        ->excludes(create)
        ->excludes(apply)
        ->excludes(remove)
        ->excludes(rename);
}

}  // namespace tool
