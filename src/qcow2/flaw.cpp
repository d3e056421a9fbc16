#include "qcow2/flaw.h"

#include <fmt/format.h>

#include "base/bits.h"
#include "format/header.h"
#include "qcow/text.h"

namespace qcow::qcow2 {
namespace {

/// Bytes of a name in a message: enough to tell most names apart. The format allows 65535.
constexpr std::size_t max_name = 100;

std::string name_of(const Place& place) { return printable(place.name.value_or(""), max_name); }

/// The place of a flaw. An error from reading a structure names the place more exactly.
std::string place_text(const Flaw& flaw) {
    const bool named = flaw.kind != Flaw::Kind::unusable || flaw.target == Structure::l1_table;
    return named ? text_of(flaw.place) : flaw.reason->place;
}

std::string past_end_text(const Flaw& flaw) {
    const auto at = flaw.at.value;
    switch (flaw.target) {
        case Structure::l2_table:
            return fmt::format("the L2 table at {:#x} reaches past the end of the file ({} bytes)", at, flaw.limit);
        case Structure::data:
            return fmt::format("the cluster at host offset {:#x} lies past the end of the {} ({} bytes)", at,
                               flaw.in_data_file ? "external data file" : "file", flaw.limit);
        case Structure::compressed:
            return fmt::format("the compressed cluster at host offset {:#x} {} past the end of the file ({} bytes)", at,
                               at >= flaw.limit ? "lies" : "reaches", flaw.limit);
        default:
            return fmt::format("its {} bytes at host offset {:#x} reach past the end of the file ({} bytes)",
                               flaw.bytes, at, flaw.limit);
    }
}

std::string what_text(const Flaw& flaw) {
    const auto at = flaw.at.value;
    switch (flaw.kind) {
        case Flaw::Kind::unusable:
            return flaw.reason->what + (flaw.target == Structure::refcount_table ? "; no refcount was compared" : "");
        case Flaw::Kind::misaligned:
            if (!flaw.detail.empty()) break;
            return fmt::format("{} {:#x} is not a multiple of the cluster size",
                               flaw.target == Structure::l2_table ? "the L2 table's offset" : "host offset", at);
        case Flaw::Kind::past_end: return past_end_text(flaw);
        case Flaw::Kind::overlap:
            return fmt::format("its {} bytes at host offset {:#x} overlap other metadata at {:#x}", flaw.bytes, at,
                               flaw.limit);
        case Flaw::Kind::wrong_length:
            return fmt::format("its table has {} entries, but the disk needs {}", flaw.bytes / 8, flaw.limit);
        case Flaw::Kind::too_long:
            return fmt::format("its {} entries are more than {}", flaw.bytes / 8, flaw.limit / 8);
        case Flaw::Kind::reserved_bits:
            if (!flaw.detail.empty()) break;
            return fmt::format("reserved bits are set ({:#x})", flaw.word);
        case Flaw::Kind::copied_flag:
            if (!flaw.detail.empty()) break;
            return flaw.target == Structure::l2_table ? "COPIED, but there is no L2 table" : "not marked COPIED";
        case Flaw::Kind::contradiction: break;
        case Flaw::Kind::misplaced:
            return fmt::format("host offset {:#x} in the external data file is not the guest's", at);
        case Flaw::Kind::duplicate: return fmt::format("there is more than one bitmap \"{}\"", name_of(flaw.place));
        case Flaw::Kind::stale_autoclear:
            return flaw.word == format::autoclear::bitmaps ? "bitmaps without a bitmaps extension"
                                                           : "raw external data without an external data file";
        case Flaw::Kind::refused_bitmap: return fmt::format("{}, so QEMU refuses the image", flaw.detail);
        case Flaw::Kind::data_file_cut:
            return fmt::format("the disk has {} bytes, but its raw data file {} only {}: the file was cut", flaw.bytes,
                               printable(flaw.detail), flaw.limit);
    }
    return fmt::format("{} ({:#018x})", flaw.detail, flaw.word);
}

CheckFinding::Kind kind_of(Flaw::Kind kind) {
    using Kind = CheckFinding::Kind;
    switch (kind) {
        case Flaw::Kind::unusable: return Kind::bad_table;
        case Flaw::Kind::misaligned: return Kind::misaligned;
        case Flaw::Kind::past_end:
        case Flaw::Kind::data_file_cut: return Kind::past_end;
        case Flaw::Kind::overlap: return Kind::overlap;
        case Flaw::Kind::wrong_length:
        case Flaw::Kind::too_long: return Kind::wrong_length;
        case Flaw::Kind::reserved_bits: return Kind::reserved_bits;
        case Flaw::Kind::copied_flag: return Kind::copied_flag;
        case Flaw::Kind::contradiction: return Kind::bad_entry;
        case Flaw::Kind::misplaced: return Kind::misplaced;
        case Flaw::Kind::duplicate: return Kind::duplicate_name;
        case Flaw::Kind::stale_autoclear: return Kind::bad_header;
        case Flaw::Kind::refused_bitmap: return Kind::bad_entry;
    }
    return Kind::other;
}

CheckFinding::Remedy remedy_of(const Flaw& flaw) {
    using Remedy = CheckFinding::Remedy;
    switch (flaw.place.structure) {
        case Structure::bitmap:
            if (flaw.kind == Flaw::Kind::refused_bitmap && flaw.word != 0) return Remedy::correct_entry;
            return Remedy::remove_bitmap;
        case Structure::bitmap_directory:
        case Structure::bitmap_table: return Remedy::remove_bitmap;
        case Structure::snapshot_table: return Remedy::remove_snapshot;
        case Structure::refcount_table:
        case Structure::refcount_block: return Remedy::rebuild_refcounts;
        case Structure::header:
            if (flaw.target == Structure::refcount_table) return Remedy::rebuild_refcounts;
            return flaw.kind == Flaw::Kind::stale_autoclear ? Remedy::correct_entry : Remedy::nothing;
        case Structure::l1_table:
            if (!flaw.place.index) return flaw.place.name ? Remedy::remove_snapshot : Remedy::nothing;
            break;
        case Structure::l2_table:
            if (flaw.kind == Flaw::Kind::misplaced) return Remedy::nothing;
            // Most of such a stream is there, if not all of it.
            if (flaw.target == Structure::compressed && flaw.kind == Flaw::Kind::past_end && !flaw.hides_references)
                return Remedy::copy_contents;
            if (flaw.kind == Flaw::Kind::past_end) return Remedy::drop_entry;
            break;
        default: return Remedy::nothing;
    }
    return flaw.hides_references ? Remedy::drop_entry : Remedy::correct_entry;
}

}  // namespace

std::string text_of(const Place& place) {
    const auto with_entry = [&](std::string table) {
        return place.index ? fmt::format("{}: entry {}", table, *place.index) : table;
    };
    switch (place.structure) {
        case Structure::header:
            return place.name ? fmt::format("header field {} (byte {})", *place.name, place.index.value_or(0))
                              : "header";
        case Structure::encryption_header: return "encryption header";
        case Structure::refcount_table:
            return place.index ? fmt::format("refcount table entry {}", *place.index) : "refcount table";
        case Structure::refcount_block:
            return fmt::format("refcount table entry {}: refcount block", place.index.value_or(0));
        case Structure::l1_table:
            return with_entry(place.name ? fmt::format("L1 table of snapshot \"{}\" at host offset {:#x}",
                                                       name_of(place), place.table.value)
                                         : fmt::format("active L1 table at host offset {:#x}", place.table.value));
        case Structure::l2_table:
            return fmt::format("L2 entry at host offset {:#x} (guest offset {:#x})", place.at.value,
                               place.guest.value_or(GuestOffset{}).value);
        case Structure::snapshot_table: return "snapshot table";
        case Structure::bitmap_directory: return "bitmap directory";
        case Structure::bitmap:
            return fmt::format("bitmap \"{}\" (table at host offset {:#x})", name_of(place), place.table.value);
        case Structure::bitmap_table: {
            const auto table =
                fmt::format("bitmap \"{}\" (table at host offset {:#x}): table", name_of(place), place.table.value);
            return place.index ? fmt::format("{} entry {}", table, *place.index) : table;
        }
        case Structure::bitmap_bits:
        case Structure::data:
        case Structure::compressed: break;
    }
    return fmt::format("host cluster at {:#x}", place.at.value);
}

HostOffset subject_of(const Flaw& flaw) {
    const bool leads_astray =
        flaw.kind == Flaw::Kind::misaligned || flaw.kind == Flaw::Kind::past_end || flaw.kind == Flaw::Kind::overlap;
    const bool is_mapping_entry = (flaw.place.structure == Structure::l1_table && flaw.place.index) ||
                                  (flaw.place.structure == Structure::l2_table && flaw.target == Structure::data);
    return leads_astray && !is_mapping_entry ? flaw.at : flaw.place.at;
}

CheckFinding::Severity severity_of(const Flaw& flaw) {
    // The format allows what QEMU refuses.
    return flaw.kind == Flaw::Kind::refused_bitmap ? CheckFinding::Severity::error : CheckFinding::Severity::corruption;
}

CheckFinding finding_of(const Flaw& flaw, unsigned cluster_bits) {
    return {severity_of(flaw),
            place_text(flaw),
            what_text(flaw),
            kind_of(flaw.kind),
            HostOffset{align_down(subject_of(flaw).value, bit(cluster_bits))},
            remedy_of(flaw)};
}

}  // namespace qcow::qcow2
