// qcow partitions and qcow df: what a disk is divided into, and how full its file systems are.

#include <fmt/format.h>

#include "command.h"
#include "inside.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

struct PartitionsOptions {
    DiskName disk;
    bool json = false;
};

void print_table(const qcow::PartitionTable& table) {
    using Kind = qcow::PartitionTable::Kind;
    if (table.kind == Kind::none) {
        fmt::print("no partition table; the disk holds {}\n", content_text(table.content));
        return;
    }
    fmt::print("{} {}, sectors of {} bytes{}\n", table.kind == Kind::gpt ? "GPT" : "MBR", table.uuid,
               table.sector_bytes, table.hybrid ? ", hybrid" : "");
    if (!table.content.type.empty()) fmt::print("the disk itself holds {}\n", content_text(table.content));
    Table rows({{"N", Table::Align::right},
                {"START", Table::Align::right},
                {"SIZE", Table::Align::right},
                {"TYPE"},
                {"NAME"},
                {"BOOT"},
                {"CONTENTS"}});
    for (const auto& p : table.partitions) {
        rows.add({fmt::to_string(p.number), fmt::to_string(p.start.value), human(p.bytes),
                  p.type_name.empty() ? p.type : p.type_name, qcow::printable(p.name), p.bootable ? "yes" : "",
                  p.extended ? "" : content_text(p.content)});
    }
    if (!rows.empty()) rows.print();
}

qcow::Result<int> run_partitions(const PartitionsOptions& options) {
    const auto image = QCOW_TRY(open_source(options.disk.source));
    auto disk = QCOW_TRY(disk_of(image, options.disk.source));
    if (options.disk.partition) disk = QCOW_TRY(qcow::partition_disk(disk, *options.disk.partition));
    auto table = qcow::list_partitions(*disk);
    if (!table) return std::unexpected(std::move(table).error().in(qcow::printable(options.disk.source.path)));
    for (const auto& warning : table->warnings) complain("warning: " + warning);
    if (options.json) {
        print_json(partitions_json(*table));
    } else {
        print_table(*table);
    }
    return ok;
}

struct Usage {
    std::string disk;
    qcow::FileSystemInfo info;
};

/// The file systems of the disk that can be read.
qcow::Result<std::vector<Usage>> usages(const PartitionsOptions& options) {
    std::vector<Usage> found;
    const auto image = QCOW_TRY(open_source(options.disk.source));
    const auto whole = QCOW_TRY(disk_of(image, options.disk.source));
    const auto add = [&](std::optional<unsigned> number) -> qcow::Result<void> {
        const auto info = [&]() -> qcow::Result<qcow::FileSystemInfo> {
            const auto files = QCOW_TRY(open_files(QCOW_TRY(qcow::file_system_disk(whole, number))));
            return files->info();
        }();
        const auto disk = place_of(options.disk.source.path, number);
        if (!info) return std::unexpected(qcow::Error(info.error()).in(disk));
        found.push_back({disk, *info});
        return {};
    };
    std::vector<unsigned> numbers;
    if (!options.disk.partition) {
        for (const auto& p : QCOW_TRY(qcow::list_partitions(*whole)).partitions)
            if (!p.content.type.empty()) numbers.push_back(p.number);
    }
    if (numbers.empty()) QCOW_TRY_VOID(add(options.disk.partition));
    for (const auto number : numbers) {
        auto added = add(number);
        if (!added && added.error().code != qcow::Errc::unsupported) complain(added.error().message());
    }
    return found;
}

Json space_json(const Usage& usage) {
    const auto& info = usage.info;
    Json json = {{"disk", usage.disk},
                 {"type", info.type},
                 {"label", info.label},
                 {"uuid", info.uuid},
                 {"block-size", info.block_bytes},
                 {"size", info.bytes}};
    if (info.free_bytes) json["free"] = *info.free_bytes;
    if (info.inodes) json["inodes"] = *info.inodes;
    if (info.free_inodes) json["free-inodes"] = *info.free_inodes;
    json["warnings"] = info.warnings;
    return json;
}

qcow::Result<int> run_df(const PartitionsOptions& options) {
    const auto found = QCOW_TRY(usages(options));
    if (options.json) {
        Json json = Json::array();
        for (const auto& usage : found) json.push_back(space_json(usage));
        print_json(json);
        return ok;
    }
    using enum Table::Align;
    Table rows({{"DISK"},
                {"TYPE"},
                {"LABEL"},
                {"SIZE", right},
                {"USED", right},
                {"FREE", right},
                {"USE%", right},
                {"INODES", right},
                {"FREE INODES", right}});
    for (const auto& [disk, info] : found) {
        for (const auto& warning : info.warnings) complain("warning: " + warning);
        const auto used = info.free_bytes ? info.bytes - std::min(info.bytes, *info.free_bytes) : 0;
        const auto number = [](const std::optional<std::uint64_t>& value) {
            return value ? fmt::to_string(*value) : "-";
        };
        rows.add({disk, qcow::printable(info.type), qcow::printable(info.label), human(info.bytes),
                  info.free_bytes ? human(used) : "-", info.free_bytes ? human(*info.free_bytes) : "-",
                  info.free_bytes && info.bytes != 0
                      ? fmt::format("{:.0f}%", 100.0 * static_cast<double>(used) / static_cast<double>(info.bytes))
                      : "-",
                  number(info.inodes), number(info.free_inodes)});
    }
    rows.print();
    return ok;
}

}  // namespace

void declare_partitions(CLI::App& root, int& status) {
    const auto options = std::make_shared<PartitionsOptions>();
    auto& app = declare(root, status, "partitions", "List the partitions of a disk, and what is in them",
                        "Reads GPT and MBR tables, with logical partitions. If a GPT is damaged, its backup is read.\n"
                        "Other commands take the number of a partition behind the disk: qcow ls DISK:N\n"
                        "Examples:\n"
                        "  qcow partitions disk.qcow2\n"
                        "  qcow partitions --json disk.qcow2\n"
                        "  qcow partitions disk.qcow2:3        the partitions in a partition",
                        [options] { return run_partitions(*options); });
    add_disk_options(app, options->disk);
    app.add_flag("--json", options->json, "Print a JSON object");
}

void declare_df(CLI::App& root, int& status) {
    const auto options = std::make_shared<PartitionsOptions>();
    auto& app = declare(root, status, "df", "Show how full the file systems of a disk are",
                        "Shows all partitions whose file system can be read, or only DISK:N.\n"
                        "Examples:\n"
                        "  qcow df disk.qcow2\n"
                        "  qcow df --json disk.qcow2:2",
                        [options] { return run_df(*options); });
    add_disk_options(app, options->disk);
    app.add_flag("--json", options->json, "Print a JSON array");
}

}  // namespace tool
