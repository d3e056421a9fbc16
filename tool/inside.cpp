#include "inside.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <ctime>

#include "confined.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {

std::pair<std::string, std::optional<unsigned>> split_partition(const std::string& name) {
    struct stat status = {};
    const auto colon = name.rfind(':');
    if (colon == std::string::npos || colon == 0 || lstat(name.c_str(), &status) == 0) return {name, {}};
    const auto front = name.substr(0, colon);
    if (front == "file") return {name, {}};  // a scheme, and not a disk
    unsigned number = 0;
    const auto* const end = name.data() + name.size();
    const auto [parsed, error] = std::from_chars(name.data() + colon + 1, end, number);
    if (error != std::errc() || parsed != end || number == 0) return {name, {}};
    return {front, number};
}

void add_disk_options(CLI::App& app, DiskName& disk, const std::string& snapshot) {
    app.add_option("DISK", disk.source.path, "Image file or block device; DISK:N is its partition N")
        ->required()
        ->check(name_text)
        ->transform(CLI::Validator(
            [&disk](std::string& name) -> std::string {
                const auto [front, partition] = split_partition(name);
                disk.partition = partition;
                if (auto named = name_source(disk.source, front); !named) return named.error().message();
                name = disk.source.path;
                return {};
            },
            ""));
    add_open_options(app, disk.source);
    add_snapshot_option(app, disk.source, "Look into this internal snapshot (id or name)", snapshot);
}

void add_checksum_option(CLI::App& app, DiskName& disk) {
    app.add_flag("--ignore-checksums", disk.ignores_checksums,
                 "Also read what has a wrong checksum in ext; it may be damaged");
}

qcow::Result<std::unique_ptr<qcow::FileSystem>> open_files(std::shared_ptr<qcow::Disk> disk, qcow::Access access) {
    return open_confined(
        {.open = [&disk]() -> qcow::Result<std::shared_ptr<qcow::Disk>> { return disk; }, .access = access});
}

qcow::Result<Inside> open_inside(const DiskName& name) {
    Inside inside;
    inside.image = QCOW_TRY(open_source(name.source));
    auto whole = QCOW_TRY(disk_of(inside.image, name.source));
    auto found = [&]() -> qcow::Result<void> {
        inside.disk = QCOW_TRY(qcow::file_system_disk(std::move(whole), name.partition));
        inside.files =
            QCOW_TRY(open_files(inside.disk, name.ignores_checksums ? qcow::Access::read_damaged : qcow::Access::read));
        return {};
    }();
    if (!found) return std::unexpected(std::move(found).error().in(place_of(name.source.path, name.partition)));
    warn_about(*inside.files);
    return inside;
}

std::string place_of(const std::string& disk, std::optional<unsigned> partition) {
    return qcow::printable(partition ? fmt::format("{}:{}", disk, *partition) : disk);
}

qcow::Result<qcow::Inode> find_shown_path(qcow::FileSystem& files, const std::string& path, bool follow) {
    auto found = qcow::find_path(files, path, follow);
    const auto bytes = qcow::unprintable(path);
    if (bytes == path || (!found && found.error().code != qcow::Errc::not_found)) return found;
    const auto other = qcow::find_path(files, bytes, follow);
    if (!other) return found;
    if (!found) return other;
    return std::unexpected(qcow::Error{
        qcow::Errc::invalid_argument, qcow::printable(path),
        fmt::format("two files are shown like this, inodes {} and {}; name one by --inode", *found, *other)});
}

void warn_about(qcow::FileSystem& files) {
    const auto info = files.info();
    if (!info) return;  // commands say it when they need it
    for (const auto& warning : info->warnings) complain("warning: " + warning);
}

std::string mode_text(const qcow::FileInfo& info) {
    constexpr std::string_view types = "?-dlcbps";
    std::string text(1, types.at(static_cast<std::size_t>(info.type)));
    for (const unsigned shift : {6U, 3U, 0U}) {
        const auto bits = info.mode >> shift;
        text += (bits & 4) != 0 ? 'r' : '-';
        text += (bits & 2) != 0 ? 'w' : '-';
        text += (bits & 1) != 0 ? 'x' : '-';
    }
    const auto mark = [&](std::uint32_t bit, std::size_t at, char with_x, char without) {
        if ((info.mode & bit) != 0) text[at] = text[at] == 'x' ? with_x : without;
    };
    mark(04000, 3, 's', 'S');
    mark(02000, 6, 's', 'S');
    mark(01000, 9, 't', 'T');
    return text;
}

std::string type_text(qcow::FileType type) {
    constexpr std::array<std::string_view, 8> names = {"unknown",          "regular",      "directory", "symbolic link",
                                                       "character device", "block device", "fifo",      "socket"};
    return std::string(names.at(static_cast<std::size_t>(type)));
}

std::string time_text(const std::optional<qcow::Timestamp>& time) {
    if (!time) return "-";
    const auto seconds = static_cast<std::time_t>(time->seconds);
    std::tm local = {};
    if (localtime_r(&seconds, &local) == nullptr) return fmt::format("{} s", time->seconds);
    return fmt::format("{:%Y-%m-%d %H:%M:%S}", local);
}

std::string content_text(const qcow::Content& content) {
    if (content.type.empty()) return "unknown contents";
    if (content.type == "gpt" || content.type == "dos") return content.type + " partition table";
    auto text = content.type;
    if (!content.label.empty()) text += fmt::format(" \"{}\"", qcow::printable(content.label));
    return text;
}

void add_text(Json& json, const std::string& key, const std::string& text) {
    json[key] = text;
    if (!qcow::is_utf8(text)) json[key + "-base64"] = base64(text);
}

Json file_json(const qcow::FileInfo& info) {
    Json json = {{"inode", info.inode},
                 {"type", type_text(info.type)},
                 {"mode", fmt::format("{:04o}", info.mode)},
                 {"uid", info.user},
                 {"gid", info.group},
                 {"links", info.links},
                 {"size", info.size}};
    if (info.stored_bytes != 0) json["stored-size"] = info.stored_bytes;
    if (info.type == qcow::FileType::character_device || info.type == qcow::FileType::block_device)
        json["device"] = fmt::format("{}:{}", info.major, info.minor);
    const auto add = [&](const char* name, const std::optional<qcow::Timestamp>& time) {
        if (time) json[name] = {{"sec", time->seconds}, {"nsec", time->nanoseconds}};
    };
    add("modified", info.modified);
    add("accessed", info.accessed);
    add("changed", info.changed);
    add("created", info.created);
    if (info.deleted) json["deleted"] = true;
    if (info.encrypted) json["encrypted"] = true;
    return json;
}

namespace {

Json content_json(const qcow::Content& content) {
    Json json = Json::object();
    if (!content.type.empty()) json["type"] = content.type;
    if (!content.label.empty()) json["label"] = content.label;
    if (!content.uuid.empty()) json["uuid"] = content.uuid;
    return json;
}

}  // namespace

Json partitions_json(const qcow::PartitionTable& table) {
    using Kind = qcow::PartitionTable::Kind;
    Json json = {{"table", table.kind == Kind::gpt ? "gpt" : table.kind == Kind::mbr ? "mbr" : "none"}};
    if (table.kind != Kind::none) {
        json["uuid"] = table.uuid;
        json["sector-size"] = table.sector_bytes;
    }
    if (table.hybrid) json["hybrid"] = true;
    if (!table.content.type.empty()) json["contents"] = content_json(table.content);
    json["warnings"] = table.warnings;
    json["partitions"] = Json::array();
    for (const auto& p : table.partitions) {
        Json one = {{"number", p.number}, {"start", p.start.value}, {"size", p.bytes}, {"type", p.type}};
        if (!p.type_name.empty()) one["type-name"] = p.type_name;
        if (!p.name.empty()) one["name"] = p.name;
        one["uuid"] = p.uuid;
        if (p.bootable) one["bootable"] = true;
        if (p.extended) one["extended"] = true;
        if (!p.content.type.empty()) one["contents"] = content_json(p.content);
        json["partitions"].push_back(std::move(one));
    }
    return json;
}

void complain_about(const std::string& path, const qcow::Error& error) {
    complain(qcow::Error(error).in(qcow::printable(path.empty() ? "/" : path, 1000)).message());
}

}  // namespace tool
