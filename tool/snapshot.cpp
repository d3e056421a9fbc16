// qcow snapshot: lists, makes, applies, removes and renames the internal snapshots of an image.

#include <fmt/format.h>

#include "command.h"
#include "describe.h"
#include "qcow/text.h"
#include "running.h"

namespace tool {
namespace {

struct SnapshotOptions {
    Source source;
    Running running;
    bool list = false;
    std::string create;
    std::string apply;
    std::string remove;
    std::vector<std::string> rename;
    bool json = false;
    [[nodiscard]] bool changes() const {
        return !create.empty() || !apply.empty() || !remove.empty() || !rename.empty();
    }
    /// The one to apply, remove or rename.
    [[nodiscard]] const std::string& snapshot() const {
        return !apply.empty() ? apply : !remove.empty() ? remove : rename[0];
    }
};

/// The snapshots of an image that a server has open.
qcow::Result<qcow::ImageInfo> running_info(const Running& running) {
    constexpr std::uint64_t second = 1'000'000'000;
    qcow::ImageInfo info;
    const auto image = QCOW_TRY(query(running));
    for (const auto& one : image.at("image").at("snapshots")) {
        const auto number = [&](const char* key) { return one.value(key, std::uint64_t{0}); };
        auto& snapshot = info.snapshots.emplace_back(qcow::SnapshotInfo{
            .id = one.value("id", ""),
            .name = one.value("name", ""),
            .date_seconds = number("date-sec"),
            .date_nanoseconds = static_cast<std::uint32_t>(number("date-nsec")),
            .vm_clock_nanoseconds = number("vm-clock-sec") * second + number("vm-clock-nsec"),
            .vm_state_bytes = number("vm-state-size"),
            .virtual_size = number("virtual-size"),
            .icount = {},
        });
        if (one.contains("icount")) snapshot.icount = number("icount");
    }
    return info;
}

qcow::Result<qcow::ImageInfo> file_info(const SnapshotOptions& options) {
    const auto image = QCOW_TRY(open_source(options.source, false));
    return image->info();
}

qcow::Result<int> list(const SnapshotOptions& options) {
    const auto info = QCOW_TRY(options.running.named() ? running_info(options.running) : file_info(options));
    if (info.snapshots_error) return std::unexpected(*info.snapshots_error);
    if (options.json) {
        print_json(snapshots_json(info));
    } else {
        print_snapshots(info);
    }
    return ok;
}

/// Returns the id of the snapshot that a person names: by its id or its name, or with QEMU's words for one of them.
qcow::Result<std::string> id_of(const std::vector<qcow::SnapshotInfo>& snapshots, const std::string& text) {
    const auto value_of = [&](std::string_view word) {
        return text.starts_with(word) ? std::optional(text.substr(word.size())) : std::nullopt;
    };
    const auto id = value_of("snapshot.id=");
    const auto name = value_of("snapshot.name=");
    std::vector<std::string> found;
    std::string all;
    for (const auto& snapshot : snapshots) {
        const bool means_it = id     ? snapshot.id == *id
                              : name ? snapshot.name == *name
                                     : snapshot.id == text || snapshot.name == text;
        if (!means_it) continue;
        found.push_back(snapshot.id);
        all += fmt::format("{}id {} (\"{}\")", all.empty() ? "" : ", ", qcow::printable(snapshot.id),
                           qcow::printable(snapshot.name));
    }
    if (found.size() == 1) return found.front();
    const auto place = fmt::format("snapshot \"{}\"", qcow::printable(text));
    if (found.empty()) {
        return std::unexpected(
            qcow::Error{qcow::Errc::not_found, place, "there is none of this id or name; see qcow snapshot --list"});
    }
    return std::unexpected(
        qcow::Error{qcow::Errc::invalid_argument, place,
                    "it is not clear which one is meant: " + all + "; say snapshot.id=ID or snapshot.name=NAME"});
}

qcow::Result<void> change(qcow::Snapshots snapshots, const SnapshotOptions& options) {
    if (!options.create.empty()) {
        QCOW_TRY(snapshots.create(options.create));
        return {};
    }
    const auto id = QCOW_TRY(id_of(QCOW_TRY(snapshots.list()), options.snapshot()));
    if (!options.apply.empty()) return snapshots.apply(id);
    if (!options.remove.empty()) return snapshots.remove(id);
    return snapshots.rename(id, options.rename[1]);
}

qcow::Result<int> change_running(const SnapshotOptions& options) {
    const auto tell = [&](const std::string& action, Json arguments) -> qcow::Result<int> {
        QCOW_TRY(
            execute(options.running, fmt::format("blockdev-snapshot-{}internal-sync", action), std::move(arguments)));
        return ok;
    };
    if (!options.create.empty()) return tell("", {{"name", options.create}});
    const auto id = QCOW_TRY(id_of(QCOW_TRY(running_info(options.running)).snapshots, options.snapshot()));
    if (!options.apply.empty()) return tell("apply-", {{"id", id}});
    if (!options.remove.empty()) return tell("delete-", {{"id", id}});
    return tell("rename-", {{"id", id}, {"new-name", options.rename[1]}});
}

qcow::Result<int> run(const SnapshotOptions& options) {
    if (options.source.path.empty() != options.running.named()) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "",
                                           options.running.named()
                                               ? "--control stands in place of IMAGE; leave one of them out"
                                               : "IMAGE is missing"});
    }
    if (!options.changes()) return list(options);
    if (options.running.named()) return change_running(options);
    if (options.source.force_share) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option --force-share",
                                           "works only with --list: two programs that write to an image destroy it"});
    }
    auto spec = QCOW_TRY(spec_of(options.source));
    spec.write.emplace();
    const StopOnSignals signals;
    const auto image = QCOW_TRY(open(spec));
    QCOW_TRY_VOID(change(image->snapshots(), options));
    QCOW_TRY_VOID(image->close());
    return ok;
}

}  // namespace

void declare_snapshot(CLI::App& root, int& status) {
    const auto options = std::make_shared<SnapshotOptions>();
    auto& app = declare(
        root, status, "snapshot", "List, make, apply, remove or rename the internal snapshots of an image",
        "A snapshot keeps the contents of the disk within the image. It is found by its id or its name. If\n"
        "that means two, snapshot.id=ID or snapshot.name=NAME says which. A crash leaves the image as it was\n"
        "before or as it is after the change. Applying one marks the whole disk as changed in enabled bitmaps.\n"
        "Examples:\n"
        "  qcow snapshot -l disk.qcow2\n"
        "  qcow snapshot -c before-upgrade disk.qcow2\n"
        "  qcow snapshot -a before-upgrade disk.qcow2       the present contents of the disk are lost\n"
        "  qcow snapshot -d before-upgrade disk.qcow2\n"
        "  qcow snapshot --rename 1 monday disk.qcow2\n"
        "  qcow convert -l NAME disk.qcow2 old.raw          copy the contents of a snapshot",
        [options] { return run(*options); });
    add_source_options(app, options->source)->required(false);
    add_running_options(app, options->running);
    auto* list =
        app.add_flag("-l,--list", options->list, "List the id, name, date and sizes of each snapshot (the default)");
    auto* create = app.add_option("-c,--create", options->create, "Make a snapshot of the disk")->type_name("NAME");
    auto* apply = app.add_option("-a,--apply", options->apply,
                                 "Make the disk what it was when this snapshot was made, and as large")
                      ->type_name("SNAPSHOT");
    auto* remove = app.add_option("-d,--delete", options->remove, "Remove this snapshot")->type_name("SNAPSHOT");
    auto* rename = app.add_option("--rename", options->rename, "Give this snapshot another name")
                       ->type_name("SNAPSHOT NAME")
                       ->expected(2)
                       ->allow_extra_args(false);
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
