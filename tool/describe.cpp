#include "describe.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <ctime>

#include "inside.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

using qcow::printable;

std::string date(const qcow::SnapshotInfo& snapshot) {
    const auto seconds = static_cast<std::time_t>(snapshot.date_seconds);
    std::tm local = {};
    localtime_r(&seconds, &local);
    return fmt::format("{:%Y-%m-%d %H:%M:%S}", local);
}

/// Hours, minutes, seconds and thousandths.
std::string clock(std::uint64_t nanoseconds) {
    const std::uint64_t seconds = nanoseconds / 1'000'000'000;
    return fmt::format("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60,
                       nanoseconds / 1'000'000 % 1000);
}

std::string_view feature_kind(qcow::Feature::Kind kind) {
    switch (kind) {
        case qcow::Feature::Kind::incompatible: return "incompatible";
        case qcow::Feature::Kind::compatible: return "compatible";
        case qcow::Feature::Kind::autoclear: return "autoclear";
    }
    return "";
}

std::string join(const std::vector<std::string>& words) { return fmt::format("{}", fmt::join(words, ", ")); }

class Lines {
public:
    void add(std::string_view label, const std::string& value, Colour colour = Colour::none) {
        fmt::print("{} {}\n", paint(fmt::format("{:<17}", fmt::format("{}:", label)), Colour::dim),
                   paint(value, colour));
    }
};

std::string reference_text(const qcow::ReferenceInfo& reference) {
    std::string text = printable(reference.name);
    if (!reference.path.empty() && reference.path != reference.name)
        text += fmt::format(" (path {})", printable(reference.path));
    text +=
        reference.format.empty() ? ", format not recorded" : fmt::format(", format {}", printable(reference.format));
    return text;
}

std::string encryption_text(const qcow::EncryptionInfo& encryption) {
    std::string text = encryption.method;
    if (encryption.key_bits != 0)
        text += fmt::format(", {}, {}-bit key", printable(encryption.cipher), encryption.key_bits);
    if (!encryption.hash.empty()) text += ", " + printable(encryption.hash);
    if (encryption.slots != 0) {
        text += fmt::format(", {} of {} key slots used ({})", encryption.used_slots.size(), encryption.slots,
                            fmt::join(encryption.used_slots, " "));
    }
    return text;
}

std::uint64_t clusters(std::uint64_t bytes, std::uint64_t cluster_size) {
    return cluster_size == 0 ? 0 : bytes / cluster_size + (bytes % cluster_size != 0);
}

}  // namespace

std::vector<std::string> warnings_of(const qcow::ImageInfo& info) {
    std::vector<std::string> warnings;
    for (const auto* error : {&info.encryption_error, &info.snapshots_error, &info.bitmaps_error})
        if (*error) warnings.push_back((*error)->message());
    return warnings;
}

Json snapshots_json(const qcow::ImageInfo& info) {
    Json result = Json::array();
    for (const auto& s : info.snapshots) {
        Json one = {{"id", s.id},
                    {"name", s.name},
                    {"virtual-size", s.virtual_size},
                    {"vm-state-size", s.vm_state_bytes},
                    {"date-sec", s.date_seconds},
                    {"date-nsec", s.date_nanoseconds},
                    {"vm-clock-sec", s.vm_clock_nanoseconds / 1'000'000'000},
                    {"vm-clock-nsec", s.vm_clock_nanoseconds % 1'000'000'000}};
        if (s.icount) one["icount"] = *s.icount;
        result.push_back(std::move(one));
    }
    return result;
}

namespace {

/// What qemu-img has under "format-specific".
Json qcow2_json(const qcow::ImageInfo& info) {
    Json json = {{"compat", info.version < 3 ? "0.10" : "1.1"},
                 {"compression-type", info.compression},
                 {"refcount-bits", info.refcount_bits}};
    if (info.version < 3) return json;
    json["lazy-refcounts"] = info.lazy_refcounts;
    json["corrupt"] = info.corrupt;
    json["extended-l2"] = info.extended_l2;
    if (info.data_file) {
        json["data-file"] = info.data_file->name;
        json["data-file-raw"] = info.data_file_raw;
    }
    return json;
}

}  // namespace

Json info_json(const qcow::ImageInfo& info) {
    // Keys are QEMU's where qemu-img prints the same thing.
    Json json = {{"filename", info.filename},
                 {"format", qcow::format_name(info.format)},
                 {"virtual-size", info.virtual_size},
                 {"actual-size", info.disk_size},
                 {"file-size", info.file_size}};
    json["encrypted"] = info.encryption.has_value();
    if (info.encryption) {
        const auto& e = *info.encryption;
        json["encrypt"] = {{"format", e.method}, {"cipher", e.cipher}, {"key-bits", e.key_bits}};
        if (!e.hash.empty()) json["encrypt"]["hash"] = e.hash;
        if (e.slots != 0) {
            json["encrypt"]["slots"] = e.slots;
            json["encrypt"]["used-slots"] = e.used_slots;
        }
    }
    if (info.version == 0) return json;
    if (info.format == qcow::Format::qcow2) json["format-specific"] = {{"type", "qcow2"}, {"data", qcow2_json(info)}};
    json["version"] = info.version;
    json["cluster-size"] = info.cluster_size;
    json["compression-type"] = info.compression;
    if (info.refcount_bits != 0) {
        json["refcount-bits"] = info.refcount_bits;
        json["lazy-refcounts"] = info.lazy_refcounts;
        json["extended-l2"] = info.extended_l2;
        json["dirty-flag"] = info.dirty;
        json["corrupt"] = info.corrupt;
        json["features"] = Json::array();
        for (const auto& f : info.features) {
            json["features"].push_back(
                {{"kind", feature_kind(f.kind)}, {"bit", f.bit}, {"name", f.name}, {"known", f.known}});
        }
    }
    if (info.backing) {
        json["backing-filename"] = info.backing->name;
        if (!info.backing->path.empty()) json["full-backing-filename"] = info.backing->path;
        if (!info.backing->format.empty()) json["backing-filename-format"] = info.backing->format;
    }
    if (info.data_file) {
        json["data-file"] = info.data_file->name;
        json["full-data-file"] = info.data_file->path;
        json["data-file-raw"] = info.data_file_raw;
    }
    json["snapshots"] = snapshots_json(info);
    json["bitmaps"] = Json::array();
    for (const auto& b : info.bitmaps) {
        json["bitmaps"].push_back(
            {{"name", b.name}, {"granularity", b.granularity}, {"in-use", b.in_use}, {"auto", b.enabled}});
    }
    json["bitmaps-stale"] = info.bitmaps_stale;
    json["unknown-extensions"] = Json::array();
    for (const auto& e : info.unknown_extensions)
        json["unknown-extensions"].push_back({{"type", e.type}, {"length", e.length}});
    json["warnings"] = warnings_of(info);
    return json;
}

void print_info(const qcow::ImageInfo& info) {
    Lines lines;
    lines.add("image", printable(info.filename), Colour::bold);
    lines.add("format", fmt::format("{}{}", qcow::format_name(info.format),
                                    info.version > 1 ? fmt::format(", version {}", info.version) : ""));
    lines.add("virtual size", human_exact(info.virtual_size));
    lines.add("disk size", fmt::format("{}, file length {}", human_exact(info.disk_size), human(info.file_size)));
    if (info.encryption) lines.add("encryption", encryption_text(*info.encryption));
    if (info.version == 0) return;
    lines.add("cluster size", human(info.cluster_size));
    lines.add("compression", info.compression);
    if (info.refcount_bits != 0)
        lines.add("refcounts", fmt::format("{} bits{}", info.refcount_bits, info.lazy_refcounts ? ", lazy" : ""));
    std::vector<std::string> features;
    features.reserve(info.features.size());
    for (const auto& f : info.features) {
        features.push_back(
            fmt::format("{}{}", printable(f.name), f.known ? "" : fmt::format(" (unknown, {})", feature_kind(f.kind))));
    }
    if (!features.empty()) lines.add("features", join(features));
    if (info.backing) lines.add("backing file", reference_text(*info.backing));
    if (info.data_file) {
        lines.add("data file", fmt::format("{}{}", reference_text(*info.data_file),
                                           info.data_file_raw ? " (a valid raw image)" : ""));
    }
    if (info.dirty) {
        lines.add("dirty", "yes: not closed; refcounts may be old, and opening the image for writing rebuilds them",
                  Colour::yellow);
    }
    if (info.corrupt)
        lines.add("corrupt", "yes: a writer found damage and marked the image; see qcow check", Colour::red);
    if (!info.snapshots.empty()) {
        lines.add("snapshots", fmt::format("{}", info.snapshots.size()));
        print_snapshots(info);
    }
    for (const auto& b : info.bitmaps) {
        lines.add("bitmap",
                  fmt::format("\"{}\", granularity {}{}{}", printable(b.name), human(b.granularity),
                              b.enabled ? ", recording" : "",
                              b.in_use ? ", in use: being written, or not closed; its contents are not valid" : ""));
    }
    if (info.bitmaps_stale)
        lines.add("bitmaps", "out of date: a program that does not know bitmaps has written the image", Colour::yellow);
    for (const auto& e : info.unknown_extensions)
        lines.add("extension", fmt::format("unknown, type {:#010x}, {} bytes", e.type, e.length));
}

void print_contents(const qcow::PartitionTable& table) {
    Lines lines;
    if (!table.content.type.empty()) lines.add("contents", content_text(table.content));
    for (const auto& p : table.partitions) {
        auto text = fmt::format("{}, {}", p.type_name.empty() ? p.type : p.type_name, human(p.bytes));
        if (!p.name.empty()) text += fmt::format(", \"{}\"", printable(p.name));
        if (!p.extended) text += fmt::format(": {}", content_text(p.content));
        lines.add(fmt::format("partition {}", p.number), text);
    }
}

void print_snapshots(const qcow::ImageInfo& info) {
    if (info.snapshots.empty()) {
        fmt::print("no internal snapshots\n");
        return;
    }
    Table table({{"ID"},
                 {"NAME"},
                 {"DATE"},
                 {"VM CLOCK"},
                 {"VM STATE", Table::Align::right},
                 {"ICOUNT", Table::Align::right},
                 {"VIRTUAL SIZE", Table::Align::right}});
    for (const auto& s : info.snapshots) {
        table.add({printable(s.id), printable(s.name), date(s), clock(s.vm_clock_nanoseconds), human(s.vm_state_bytes),
                   s.icount ? std::to_string(*s.icount) : "--", human(s.virtual_size)});
    }
    table.print();
}

Json usage_json(const qcow::Usage& usage, std::uint64_t cluster_size) {
    const auto amount = [&](std::uint64_t bytes) {
        return Json{{"bytes", bytes}, {"clusters", clusters(bytes, cluster_size)}};
    };
    Json json = {
        {"cluster-size", cluster_size}, {"unallocated", amount(usage.unallocated_bytes)}, {"layers", Json::array()}};
    for (const auto& layer : usage.layers) {
        json["layers"].push_back({{"data", amount(layer.data_bytes)},
                                  {"compressed", amount(layer.compressed_bytes)},
                                  {"zero", amount(layer.zero_bytes)},
                                  {"fragments", layer.fragments}});
    }
    return json;
}

void print_usage(const qcow::Usage& usage, std::uint64_t cluster_size) {
    using Align = Table::Align;
    Table table({{"LAYER"},
                 {"DATA", Align::right},
                 {"COMPRESSED", Align::right},
                 {"ZERO", Align::right},
                 {"CLUSTERS", Align::right},
                 {"FRAGMENTS", Align::right}});
    for (std::size_t depth = 0; depth < usage.layers.size(); ++depth) {
        const auto& l = usage.layers[depth];
        const auto all = l.data_bytes + l.compressed_bytes + l.zero_bytes;
        table.add({fmt::format("{}", depth), human(l.data_bytes), human(l.compressed_bytes), human(l.zero_bytes),
                   fmt::format("{}", clusters(all, cluster_size)), fmt::format("{}", l.fragments)});
    }
    table.add({"none", "", "", human(usage.unallocated_bytes),
               fmt::format("{}", clusters(usage.unallocated_bytes, cluster_size)), ""});
    table.print();
}

}  // namespace tool
