#include "qcow2/walker.h"

#include <algorithm>
#include <optional>
#include <set>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "base/going_on.h"
#include "format/refcount.h"
#include "qcow2/l2_walk.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {
namespace {

using format::L1Entry;

constexpr std::uint64_t table_piece_bytes = 64 * KiB;

/// Whether something is wrong with the image, and not with looking at it.
bool is_flaw(const Error& error) { return error.code != Errc::io && error.code != Errc::no_memory; }

Place structure(Structure kind, HostOffset at) { return {kind, at, at}; }

Place entry_of(const Place& table, std::uint64_t index) {
    Place place = table;
    place.at = table.table + index * 8;
    place.index = index;
    return place;
}

class Walker {
public:
    Walker(const Metadata& metadata, std::uint64_t file_bytes, const WalkOptions& options, Visitor& visitor)
        : metadata_(metadata),
          state_(metadata.state()),
          geometry_(metadata.geometry()),
          rules_(metadata.rules()),
          options_(options),
          visitor_(visitor),
          file_size_(file_bytes),
          file_clusters_(geometry_.clusters(file_bytes)),
          l2_tables_(metadata, file_bytes, options, visitor) {}

    Result<MappedClusters> run() {
        TRY(visit_table(structure(Structure::header, {0}), Structure::header, {0}, geometry_.cluster_size()));
        const bool has_refcounts = options_.refcounts && TRY(visit_refcount_table());
        TRY_VOID(visit_encryption_header());
        TRY_VOID(verify_autoclear_bits());
        TRY_VOID(verify_data_file());
        if (has_refcounts) TRY_VOID(visit_refcount_blocks());
        TRY_VOID(visit_bitmaps());
        TRY_VOID(visit_l1_table(structure(Structure::l1_table, state_.l1_table), state_.l1_entries, true));
        TRY_VOID(visit_snapshots());
        return l2_tables_.visit(data_file_size_);
    }

private:
    /// Visits a structure, or another reference to host clusters. Returns false, after a flaw, if these are not in the
    /// file.
    Result<bool> visit_table(const Place& place, Structure kind, HostOffset at, std::uint64_t bytes) {
        if (bytes == 0) return true;
        Flaw flaw{.place = place, .target = kind, .at = at, .bytes = bytes, .hides_references = true};
        if (!is_aligned(at.value, geometry_.cluster_size())) {
            flaw.kind = Flaw::Kind::misaligned;
        } else if (at.value >= file_size_ || bytes > file_clusters_ * geometry_.cluster_size() - at.value) {
            flaw.kind = Flaw::Kind::past_end;
            flaw.limit = file_size_;
        } else {
            TRY_VOID(visitor_.reference({kind, place, at, bytes}));
            return true;
        }
        TRY_VOID(visitor_.flaw(flaw));
        return false;
    }

    /// The same for a table that is read afterwards. Returns false, after a flaw, also if part of it was visited
    /// before. So no cluster is read twice, however many tables are said to lie in one place.
    Result<bool> visit_table_to_read(const Place& place, Structure kind, HostOffset at, std::uint64_t bytes) {
        const std::uint64_t first = at.value >> geometry_.cluster_bits;
        const std::uint64_t end = first + std::min(geometry_.clusters(bytes), file_clusters_);
        const std::uint64_t taken = visitor_.next_used(first, end);
        if (taken >= end) return visit_table(place, kind, at, bytes);
        TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::overlap,
                                .place = place,
                                .target = kind,
                                .at = at,
                                .bytes = bytes,
                                .limit = taken << geometry_.cluster_bits,
                                .hides_references = true}));
        // The clusters before the overlap are in use now as well, so that the next overlap is found at once.
        const HostOffset begin{first << geometry_.cluster_bits};
        TRY_VOID(visitor_.reference({kind, place, begin, (taken - first + 1) << geometry_.cluster_bits}));
        return false;
    }

    /// Calls `visit(index, word)` for each word of a table that lies in the file and is not zero. Holes are not read.
    template <class Visit>
    Result<void> each_word(HostOffset table, std::uint64_t entries, Visit visit) {
        std::vector<std::byte> buffer(std::min(entries * 8, table_piece_bytes));
        for (std::uint64_t first = 0; first < entries;) {
            TRY_VOID(verify_goes_on(options_.control));
            const auto run = TRY(metadata_.file().run(table + first * 8, (entries - first) * 8));
            if (!run.data && run.length >= 8) {
                first += run.length / 8;
                continue;
            }
            const auto piece = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), (entries - first) * 8));
            TRY(metadata_.file().read(table + first * 8, piece));
            for (std::size_t at = 0; at < piece.size(); at += 8) {
                if (const auto word = load_be<std::uint64_t>(piece, at); word != 0)
                    TRY_VOID(visit(first + at / 8, word));
            }
            first += piece.size() / 8;
        }
        return {};
    }

    /// Returns whether the image has refcounts.
    Result<bool> visit_refcount_table() {
        if (auto verified = format::verify_refcount_table(state_, geometry_.cluster_bits,
                                                          file_clusters_ * geometry_.cluster_size());
            !verified) {
            TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::unusable,
                                    .target = Structure::refcount_table,
                                    .at = state_.refcount_table,
                                    .reason = &verified.error()}));
            return false;
        }
        return visit_table(structure(Structure::refcount_table, state_.refcount_table), Structure::refcount_table,
                           state_.refcount_table, refcount_table_bytes());
    }

    [[nodiscard]] std::uint64_t refcount_table_bytes() const {
        return std::uint64_t{state_.refcount_table_clusters} << geometry_.cluster_bits;
    }

    Result<void> visit_encryption_header() {
        if (!metadata_.header().encryption) return {};
        const auto [at, length] = *metadata_.header().encryption;
        TRY(visit_table(structure(Structure::encryption_header, at), Structure::encryption_header, at, length));
        return {};
    }

    [[nodiscard]] bool has_autoclear(std::uint64_t bit) const { return (state_.autoclear & bit) != 0; }

    /// Bits that say something about what the image does not have.
    Result<void> verify_autoclear_bits() {
        const auto report = [&](std::uint64_t bit) {
            return visitor_.flaw({.kind = Flaw::Kind::stale_autoclear,
                                  .place = {.index = 88, .name = "autoclear_features"},
                                  .target = Structure::header,
                                  .word = bit});
        };
        if (has_autoclear(format::autoclear::bitmaps) && !state_.bitmaps) TRY_VOID(report(format::autoclear::bitmaps));
        if (has_autoclear(format::autoclear::raw_external_data) && !rules_.external_data)
            TRY_VOID(report(format::autoclear::raw_external_data));
        return {};
    }

    Result<void> verify_data_file() {
        if (!rules_.external_data || options_.data_file == nullptr) return {};
        data_file_size_ = TRY(options_.data_file->size());
        if (!has_autoclear(format::autoclear::raw_external_data) || *data_file_size_ >= state_.size) return {};
        return visitor_.flaw({.kind = Flaw::Kind::data_file_cut,
                              .place = {.index = 24, .name = "size"},
                              .target = Structure::header,
                              .bytes = state_.size,
                              .limit = *data_file_size_,
                              .detail = options_.data_file->name()});
    }

    /// An entry whose other bits are set. It is followed all the same.
    Result<void> report_reserved_bits(const Place& place, std::uint64_t word) {
        return visitor_.flaw({.kind = Flaw::Kind::reserved_bits, .place = place, .word = word});
    }

    Result<void> visit_refcount_blocks() {
        const auto table = structure(Structure::refcount_table, state_.refcount_table);
        return each_word(table.at, refcount_table_bytes() / 8,
                         [&](std::uint64_t index, std::uint64_t word) -> Result<void> {
                             const format::RefcountTableEntry entry{word};
                             Place place = entry_of(table, index);
                             if (entry.reserved_bits_set()) TRY_VOID(report_reserved_bits(place, word));
                             if (!entry.allocated()) return {};
                             place.structure = Structure::refcount_block;
                             TRY(visit_table(place, Structure::refcount_block, entry.block(), geometry_.cluster_size()));
                             return {};
                         });
    }

    Result<void> visit_bitmaps() {
        if (!state_.bitmaps_consistent()) return {};
        const auto& extension = *state_.bitmaps;
        Place place = structure(Structure::bitmap_directory, extension.directory);
        const auto bitmaps = read_bitmaps(metadata_);
        if (!bitmaps) return report_unusable(place, bitmaps.error());
        TRY(visit_table(place, Structure::bitmap_directory, extension.directory, extension.directory_size));
        std::set<std::string_view> names;
        for (const auto& bitmap : *bitmaps) {
            if (!names.insert(bitmap.info.name).second) {
                place.name = bitmap.info.name;
                TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::duplicate,
                                        .place = place,
                                        .target = Structure::bitmap_directory,
                                        .at = extension.directory}));
            }
            TRY_VOID(visit_bitmap(bitmap));
        }
        return {};
    }

    /// A structure that cannot be used for this reason. Returns the reason if it is not about the image.
    Result<void> report_unusable(const Place& place, const Error& reason) {
        if (!is_flaw(reason)) return std::unexpected(reason);
        return visitor_.flaw({.kind = Flaw::Kind::unusable,
                              .place = place,
                              .target = place.structure,
                              .at = place.at,
                              .reason = &reason,
                              .hides_references = true});
    }

    /// Returns whether the table is short enough, and reports it else.
    Result<bool> limit_length(const Place& place, std::uint64_t bytes, std::uint64_t most) {
        if (options_.guest_data || bytes <= most) return true;
        TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::too_long,
                                .place = place,
                                .target = place.structure,
                                .at = place.at,
                                .bytes = bytes,
                                .limit = most,
                                .hides_references = true}));
        return false;
    }

    Result<void> visit_bitmap(const format::BitmapEntry& bitmap) {
        Place table = structure(Structure::bitmap, bitmap.table);
        table.name = bitmap.info.name;
        const std::uint64_t bytes = std::uint64_t{bitmap.table_entries} * 8;
        const std::uint64_t bits_per_entry = geometry_.cluster_size() * 8;
        const auto needed = divide_up(divide_up(state_.size, bitmap.info.granularity), bits_per_entry);
        if (!bitmap.info.in_use && bitmap.table_entries != needed) {
            TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::wrong_length,
                                    .place = table,
                                    .target = Structure::bitmap_table,
                                    .at = bitmap.table,
                                    .bytes = bytes,
                                    .limit = needed}));
        }
        if (const auto refusal = bitmap.refusal(); !refusal.empty()) {
            TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::refused_bitmap,
                                    .place = table,
                                    .target = Structure::bitmap_table,
                                    .at = bitmap.table,
                                    .bytes = bytes,
                                    .word = bitmap.without_ignorable_data().refusal().empty() ? bitmap.flags : 0,
                                    .detail = refusal}));
        }
        table.structure = Structure::bitmap_table;
        if (!TRY(limit_length(table, bytes, format::max_bitmap_bytes / geometry_.cluster_size() * 8))) return {};
        if (!TRY(visit_table_to_read(table, Structure::bitmap_table, bitmap.table, bytes))) return {};
        return each_word(bitmap.table, bitmap.table_entries,
                         [&](std::uint64_t index, std::uint64_t word) -> Result<void> {
                             const format::BitmapTableEntry entry{word};
                             const Place place = entry_of(table, index);
                             if (entry.reserved_bits_set()) TRY_VOID(report_reserved_bits(place, word));
                             if (entry.cluster().value == 0) return {};
                TRY(visit_table(place, Structure::bitmap_bits, entry.cluster(), geometry_.cluster_size()));
                             return {};
                         });
    }

    Result<void> visit_snapshots() {
        const auto place = structure(Structure::snapshot_table, state_.snapshot_table);
        const auto snapshots = read_snapshots(metadata_);
        if (!snapshots) return report_unusable(place, snapshots.error());
        TRY(visit_table(place, Structure::snapshot_table, state_.snapshot_table, snapshots->bytes));
        for (const auto& snapshot : snapshots->entries) {
            Place table = structure(Structure::l1_table, snapshot.l1_table);
            table.name = snapshot.info.name;
            if (!options_.guest_data) {
                const std::uint64_t bytes = std::uint64_t{snapshot.l1_entries} * 8;
                if (TRY(limit_length(table, bytes, format::max_l1_bytes)))
                    TRY(visit_table(table, Structure::l1_table, snapshot.l1_table, bytes));
                continue;
            }
            if (const auto verified = verify_snapshot_l1(metadata_, snapshot); !verified) {
                TRY_VOID(report_unusable(table, verified.error()));
                continue;
            }
            TRY_VOID(visit_l1_table(table, snapshot.l1_entries, false));
        }
        return {};
    }

    Result<void> visit_l1_table(const Place& table, std::uint64_t entries, bool active) {
        if (!TRY(visit_table_to_read(table, Structure::l1_table, table.at, entries * 8))) return {};
        return each_word(table.at, entries, [&](std::uint64_t index, std::uint64_t word) {
            return visit_l1_entry(entry_of(table, index), L1Entry{word}, active);
        });
    }

    Result<void> visit_l1_entry(const Place& place, L1Entry entry, bool active) {
        if (entry.reserved_bits_set()) TRY_VOID(report_reserved_bits(place, entry.word));
        Flaw flaw{.place = place,
                  .target = Structure::l2_table,
                  .at = entry.l2_table(),
                  .bytes = geometry_.cluster_size(),
                  .word = entry.word};
        if (!entry.allocated()) {
            if (!entry.copied()) return {};
            flaw.kind = Flaw::Kind::copied_flag;
            return visitor_.flaw(flaw);
        }
        flaw.hides_references = true;
        if (!is_aligned(flaw.at.value, geometry_.cluster_size())) {
            flaw.kind = Flaw::Kind::misaligned;
            return visitor_.flaw(flaw);
        }
        if (!lies_within(flaw.at.value, flaw.bytes, file_clusters_ * geometry_.cluster_size())) {
            flaw.kind = Flaw::Kind::past_end;
            flaw.limit = file_size_;
            return visitor_.flaw(flaw);
        }
        TRY_VOID(visitor_.reference(
            {Structure::l2_table, place, flaw.at, flaw.bytes, 1, active, entry.copied(), entry.word}));
        return options_.guest_data ? l2_tables_.add(flaw.at, *place.index, active) : Result<void>();
    }

    const Metadata& metadata_;
    const format::HeaderState state_;
    const format::Geometry& geometry_;
    const format::EntryRules& rules_;
    const WalkOptions& options_;
    Visitor& visitor_;
    const std::uint64_t file_size_;
    const std::uint64_t file_clusters_;

    L2Walk l2_tables_;
    std::optional<std::uint64_t> data_file_size_;
};

}  // namespace

Result<std::uint64_t> walked_length(const Metadata& metadata) {
    const std::uint64_t there = TRY(metadata.file().size());
    const auto state = metadata.state();
    return metadata.l1_left_out() ? std::max(there, state.l1_table.value + std::uint64_t{state.l1_entries} * 8) : there;
}

Result<MappedClusters> walk(const Metadata& metadata, std::uint64_t file_bytes, const WalkOptions& options,
                            Visitor& visitor) {
    return Walker(metadata, file_bytes, options, visitor).run();
}

Result<bool> is_hole(const Storage& file, HostOffset at, std::uint64_t bytes) {
    // On tmpfs, the end of a long run of data takes long to find.
    if (TRY(file.run(at, 1)).data) return false;
    const auto run = TRY(file.run(at, bytes));
    return !run.data && run.length == bytes;
}

}  // namespace qcow::qcow2
