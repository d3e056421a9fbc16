#include "qcow2/repair_directories.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>

#include "base/endian.h"
#include "base/try.h"
#include "format/geometry.h"
#include "format/header_edit.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {
namespace {

using Bytes = std::vector<std::byte>;

Result<Bytes> read_bytes(const Storage& file, HostOffset at, std::uint64_t bytes) {
    Bytes result(bytes);
    TRY(file.read(at, result));
    return result;
}

struct RawSnapshot {
    format::SnapshotEntry entry;
    Bytes bytes;  // the whole entry
};

constexpr std::size_t fixed_snapshot_bytes = 40;
constexpr std::uint32_t usual_snapshot_extra_bytes = 24;
/// Readers refuse more.
constexpr std::uint32_t max_snapshot_extra_bytes = 1024;
constexpr std::size_t max_entry_bytes = fixed_snapshot_bytes + max_snapshot_extra_bytes + std::size_t{2} * 65536;

class DirectoryRepair {
public:
    DirectoryRepair(const Metadata& metadata, const RepairPlan& plan, NewClusters& added, Storage& file)
        : metadata_(metadata), plan_(plan), added_(added), file_(file), state_(metadata.state()) {}

    Result<RepairedHeader> run() {
        format::HeaderEdit edit(TRY(read_first_cluster(file_)));
        state_.autoclear &= ~plan_.stale_autoclear;
        TRY_VOID(move_active_l1());
        TRY_VOID(repair_snapshots());
        TRY_VOID(repair_bitmaps(edit));
        edit.set_state(state_);
        result_.steps = TRY(edit.steps());
        return std::move(result_);
    }

    Result<RemovedBitmaps> remove_inconsistent() {
        RemovedBitmaps removed;
        const auto bitmaps = TRY(read_bitmaps(metadata_));
        for (const auto& bitmap : bitmaps) {
            if (bitmap.info.in_use) removed.names.push_back(bitmap.info.name);
        }
        if (removed.names.empty()) return removed;
        format::HeaderEdit edit(TRY(read_first_cluster(file_)));
        TRY_VOID(rewrite_bitmaps(edit, bitmaps, [](const auto& entry) { return entry.info.in_use; }));
        edit.set_state(state_);
        removed.steps = TRY(edit.steps());
        return removed;
    }

private:
    /// Writes a structure to new clusters.
    Result<HostOffset> put(std::span<const std::byte> bytes) {
        const std::uint64_t clusters = metadata_.geometry().clusters(bytes.size());
        const auto at = TRY(added_.allocate(clusters));
        added_.refer(at, clusters, 1);
        // A cluster that was free may hold anything.
        Bytes whole(bytes.begin(), bytes.end());
        whole.resize(clusters * metadata_.cluster_size());
        TRY_VOID(file_.write(at, whole));
        return at;
    }

    [[nodiscard]] bool is_shared(Structure kind, HostOffset at, bool of_snapshot = false) const {
        return std::ranges::any_of(plan_.shared_tables, [&](const auto& table) {
            return table.kind == kind && table.at == at && table.of_snapshot == of_snapshot;
        });
    }

    Result<void> move_active_l1() {
        if (!is_shared(Structure::l1_table, state_.l1_table)) return {};
        const std::uint64_t bytes = std::uint64_t{state_.l1_entries} * 8;
        const std::uint64_t file_size = TRY(metadata_.addressable_bytes());
        if (!lies_within(state_.l1_table.value, bytes, file_size)) {
            const std::uint64_t there = file_size - std::min(file_size, state_.l1_table.value);
            const GuestOffset guest{std::min(state_.size, there / 8 * metadata_.geometry().l2_coverage())};
            result_.losses.push_back(
                {.guest = guest,
                 .length = state_.size - guest.value,
                 .reads_as_zeros = metadata_.header().backing_name.empty(),
                 .why =
                     fmt::format("active L1 table at host offset {:#x}: it reaches past the end of the file ({} bytes)",
                                 state_.l1_table.value, file_size)});
        }
        state_.l1_table = TRY(put(TRY(read_bytes(file_, state_.l1_table, bytes))));
        return {};
    }

    // Snapshots.

    Result<void> repair_snapshots() {
        const bool any_shared = std::ranges::any_of(plan_.shared_tables, [](const auto& table) {
            return table.kind == Structure::snapshot_table || table.of_snapshot;
        });
        if (!plan_.bad_snapshot_table && plan_.bad_snapshots.empty() && !any_shared) return {};
        auto snapshots = TRY(read_readable_snapshots());
        if (snapshots.size() < state_.snapshot_count) {
            result_.losses.push_back(
                {.what = RepairLoss::What::snapshot,
                 .why = fmt::format("snapshot table at host offset {:#x}: {} of {} entries cannot be read",
                                    state_.snapshot_table.value, state_.snapshot_count - snapshots.size(),
                                    state_.snapshot_count)});
        }
        Bytes table;
        std::uint32_t kept = 0;
        for (auto& snapshot : snapshots) {
            if (!TRY(repair_snapshot(snapshot))) continue;
            table.insert(table.end(), snapshot.bytes.begin(), snapshot.bytes.end());
            ++kept;
        }
        state_.snapshot_count = kept;
        state_.snapshot_table = kept == 0 ? HostOffset{0} : TRY(put(table));
        return {};
    }

    /// The entries of the snapshot table up to the first one that cannot be read.
    Result<std::vector<RawSnapshot>> read_readable_snapshots() {
        std::vector<RawSnapshot> snapshots;
        const auto at = state_.snapshot_table;
        const std::uint64_t file_size = TRY(metadata_.addressable_bytes());
        if (at.value == 0 || at.value >= file_size || !is_aligned(at.value, metadata_.cluster_size())) return snapshots;
        // Behind it, as behind the end of a file, there are zeros.
        const auto bytes = TRY(read_bytes(
            file_, at, std::min(file_size - at.value, format::max_snapshot_table_bytes) + format::max_snapshot_bytes));
        auto rest = std::span<const std::byte>(bytes);
        while (snapshots.size() < std::min(state_.snapshot_count, format::max_snapshots)) {
            auto snapshot = read_snapshot(rest);
            if (!snapshot) break;
            rest = rest.subspan(snapshot->first);
            snapshots.push_back(std::move(snapshot->second));
        }
        return snapshots;
    }

    /// The entry at the front of `in`, well formed, and how many bytes it takes there; nothing if it cannot be read.
    [[nodiscard]] std::optional<std::pair<std::size_t, RawSnapshot>> read_snapshot(
        std::span<const std::byte> in) const {
        Bytes start(in.begin(), in.begin() + static_cast<std::ptrdiff_t>(std::min(in.size(), max_entry_bytes)));
        if (start.size() < fixed_snapshot_bytes) return std::nullopt;
        if (load_be<std::uint32_t>(start, 36) > max_snapshot_extra_bytes)
            store_be(start, 36, usual_snapshot_extra_bytes);
        auto entry = format::parse_snapshot(start, 2, state_.size);
        if (!entry || (entry->info.id.empty() && entry->info.name.empty())) return std::nullopt;
        const auto extra = load_be<std::uint32_t>(start, 36);
        if (const auto end = entry->info.name.find('\0'); end != std::string::npos) {
            // No name has a zero byte: it ends there, and the next entry follows.
            entry->info.name.resize(end);
            store_be(start, 14, static_cast<std::uint16_t>(end));
        }
        const std::size_t bytes = fixed_snapshot_bytes + extra + entry->info.id.size() + entry->info.name.size();
        const std::size_t padded = align_down(bytes + 7, 8);
        if (padded > in.size()) return std::nullopt;
        start.resize(padded);
        std::ranges::fill(std::span(start).subspan(bytes), std::byte{0});
        if (metadata_.header().version >= 3 && extra < format::min_snapshot_extra_bytes)
            start = format::encode_snapshot(*entry);
        return std::pair(padded, RawSnapshot{*std::move(entry), std::move(start)});
    }

    /// Returns false, after a loss, if the snapshot cannot be kept.
    Result<bool> repair_snapshot(RawSnapshot& snapshot) {
        auto& entry = snapshot.entry;
        if (auto verified = verify_snapshot_l1(metadata_, entry); !verified) {
            if (verified.error().code != Errc::corrupt) return std::unexpected(std::move(verified).error());
            if (!find_l1_size(entry)) {
                result_.losses.push_back(
                    {.what = RepairLoss::What::snapshot, .name = entry.info.name, .why = verified.error().message()});
                return false;
            }
            store_be(snapshot.bytes, 8, entry.l1_entries);
            if (load_be<std::uint32_t>(snapshot.bytes, 36) >= 16) store_be(snapshot.bytes, 48, entry.info.virtual_size);
        }
        if (is_shared(Structure::l1_table, entry.l1_table, true)) {
            const auto at = TRY(put(TRY(read_bytes(file_, entry.l1_table, std::uint64_t{entry.l1_entries} * 8))));
            store_be(snapshot.bytes, 0, at.value);
        }
        return true;
    }

    /// Looks for a number of entries, or a size of the disk, with which the snapshot's L1 table can be used.
    bool find_l1_size(format::SnapshotEntry& entry) const {
        const std::uint64_t coverage = metadata_.geometry().l2_coverage();
        auto attempt = entry;
        const std::uint64_t needed = divide_up(entry.info.virtual_size, coverage);
        // The entries behind the table's end in its last cluster may well be its own.
        const std::uint64_t there =
            std::max<std::uint64_t>(1, metadata_.geometry().clusters(std::uint64_t{entry.l1_entries} * 8));
        if (needed * 8 <= there * metadata_.cluster_size() && needed <= format::max_l1_bytes / 8) {
            attempt.l1_entries = static_cast<std::uint32_t>(needed);
            if (verify_snapshot_l1(metadata_, attempt)) {
                entry = attempt;
                return true;
            }
        }
        attempt = entry;
        attempt.info.virtual_size = state_.size;
        if (!verify_snapshot_l1(metadata_, attempt)) return false;
        entry = attempt;
        return true;
    }

    // Bitmaps.

    Result<void> repair_bitmaps(format::HeaderEdit& edit) {
        if (plan_.bad_bitmap_directory) return keep_readable_bitmaps(edit);
        const bool any_shared = std::ranges::any_of(plan_.shared_tables, [](const auto& table) {
            return table.kind == Structure::bitmap_directory || table.kind == Structure::bitmap_table;
        });
        if (plan_.stale_bitmaps.empty() && plan_.lost_bitmaps.empty() && !plan_.has_doubled_bitmaps &&
            !plan_.has_refused_bitmaps && !any_shared)
            return {};
        return keep_usable_bitmaps(edit, TRY(read_bitmaps(metadata_)));
    }

    /// Keeps the first bitmap of each name, unless QEMU refuses it.
    Result<void> keep_usable_bitmaps(format::HeaderEdit& edit, std::span<const format::BitmapEntry> bitmaps) {
        std::set<std::string> names;
        return rewrite_bitmaps(edit, bitmaps, [&](const format::BitmapEntry& entry) {
            const bool doubled = !names.insert(entry.info.name).second;
            const auto refusal = entry.without_ignorable_data().refusal();
            if (doubled) note_bitmap(entry, "another bitmap has the same name");
            if (!refusal.empty()) note_bitmap(entry, std::string(refusal));
            return doubled || !refusal.empty();
        });
    }

    /// Keeps the entries of a damaged directory up to the first one that cannot be read.
    Result<void> keep_readable_bitmaps(format::HeaderEdit& edit) {
        const auto& extension = *state_.bitmaps;
        const auto at = extension.directory;
        const std::uint64_t end = TRY(metadata_.addressable_bytes());
        std::vector<format::BitmapEntry> bitmaps;
        bool complete = false;
        if (is_aligned(at.value, metadata_.cluster_size()) && at.value < end) {
            const auto bytes = TRY(read_bytes(
                file_, at, std::min({extension.directory_size, end - at.value, format::max_bitmap_directory_bytes})));
            auto rest = std::span<const std::byte>(bytes);
            while (!rest.empty() && bitmaps.size() < format::max_bitmaps) {
                auto entry = format::parse_bitmap(rest);
                if (!entry) break;
                rest = rest.subspan(entry->encoded_bytes);
                bitmaps.push_back(*std::move(entry));
            }
            complete = rest.empty() && bitmaps.size() >= extension.count;
        }
        if (!complete) {
            result_.losses.push_back(
                {.what = RepairLoss::What::bitmap,
                 .why =
                     fmt::format("bitmap directory at host offset {:#x}: it cannot be read behind its first {} entries",
                                 at.value, bitmaps.size())});
        }
        return keep_usable_bitmaps(edit, bitmaps);
    }

    void note_bitmap(const format::BitmapEntry& entry, std::string why) {
        result_.losses.push_back({.what = RepairLoss::What::bitmap, .name = entry.info.name, .why = std::move(why)});
    }

    /// Writes a new directory of these bitmaps, without those for which `leave_out` returns true.
    template <class LeaveOut>
    Result<void> rewrite_bitmaps(format::HeaderEdit& edit, std::span<const format::BitmapEntry> bitmaps,
                                 const LeaveOut& leave_out) {
        Bytes directory;
        std::uint32_t kept = 0;
        for (const auto& bitmap : bitmaps) {
            if (leave_out(bitmap)) continue;
            const auto own = TRY(repair_bitmap(bitmap));
            directory.insert(directory.end(), own.begin(), own.end());
            ++kept;
        }
        if (kept == 0) {
            edit.remove_extension(format::ExtensionType::bitmaps);
            state_.autoclear &= ~format::autoclear::bitmaps;
            return {};
        }
        const format::BitmapsExtension extension{
            .count = kept, .directory_size = directory.size(), .directory = TRY(put(directory))};
        edit.set_extension(format::ExtensionType::bitmaps, encode_bitmaps_extension(extension));
        return {};
    }

    /// The entry as it has to be in the new directory.
    Result<Bytes> repair_bitmap(const format::BitmapEntry& entry) {
        const auto bitmap = entry.without_ignorable_data();
        Bytes own = format::encode_bitmap(bitmap);
        const bool shared = is_shared(Structure::bitmap_table, bitmap.table);
        const bool lost = plan_.lost_bitmaps.contains(bitmap.table) || (shared && bitmap.info.in_use);
        if (lost || plan_.stale_bitmaps.contains(bitmap.table)) {
            if (!bitmap.info.in_use)
                note_bitmap(bitmap, fmt::format("its table at host offset {:#x} is damaged", bitmap.table.value));
            store_be(own, format::BitmapEntry::flags_at, bitmap.flags | format::BitmapEntry::in_use_flag);
        }
        if (lost) {
            // Nobody reads the bits of an inconsistent bitmap, so a table of one cluster will do.
            const auto table = TRY(put(Bytes(metadata_.cluster_size())));
            const std::uint64_t bits_per_entry = metadata_.cluster_size() * 8;
            const auto needed = divide_up(divide_up(state_.size, bitmap.info.granularity), bits_per_entry);
            store_be(own, 0, table.value);
            store_be(own, format::BitmapEntry::table_entries_at,
                     static_cast<std::uint32_t>(std::clamp<std::uint64_t>(needed, 1, metadata_.cluster_size() / 8)));
        } else if (shared) {
            store_be(own, 0,
                     TRY(put(TRY(read_bytes(file_, bitmap.table, std::uint64_t{bitmap.table_entries} * 8)))).value);
        }
        return own;
    }

    const Metadata& metadata_;
    const RepairPlan& plan_;
    NewClusters& added_;
    Storage& file_;
    format::HeaderState state_;
    RepairedHeader result_ = {};
};

}  // namespace

Result<ParsableHeader> read_parsable_header(const Storage& file) {
    ParsableHeader header{TRY(read_first_cluster(file))};
    auto& cluster = header.cluster;
    if (format::parse_header(cluster) || cluster.size() < format::fixed_header_v3) return header;
    constexpr std::size_t l1_entries_at = 36;
    constexpr std::size_t l1_table_at = 40;
    constexpr std::size_t snapshot_count_at = 60;
    constexpr std::size_t incompatible_at = 72;
    const bool version3 = load_be<std::uint32_t>(cluster, 4) >= 3;
    const auto incompatible = version3 ? load_be<std::uint64_t>(cluster, incompatible_at) : 0;
    if ((incompatible & format::incompatible::external_data) != 0)
        store_be(cluster, snapshot_count_at, std::uint32_t{0});

    format::Geometry geometry;
    geometry.cluster_bits = load_be<std::uint32_t>(cluster, 20);
    geometry.extended_l2 = (incompatible & format::incompatible::extended_l2) != 0;
    const std::uint64_t needed = divide_up(load_be<std::uint64_t>(cluster, 24), geometry.l2_coverage());
    const auto entries = load_be<std::uint32_t>(cluster, l1_entries_at);
    if (needed * 8 <= format::max_l1_bytes && (entries < needed || entries > format::max_l1_bytes / 8))
        store_be(cluster, l1_entries_at, static_cast<std::uint32_t>(needed));
    const auto l1_table = load_be<std::uint64_t>(cluster, l1_table_at);
    if (l1_table == 0 || !is_aligned(l1_table, geometry.cluster_size()) ||
        l1_table > format::max_host_offset - format::max_l1_bytes) {
        // Nobody knows where it is: as if it had been cut off.
        store_be(cluster, l1_table_at, geometry.clusters(TRY(file.size())) << geometry.cluster_bits);
    }
    header.corrected = format::parse_header(cluster).has_value();
    return header;
}

Result<bool> has_refused_snapshots(const Metadata& metadata) {
    const auto state = metadata.state();
    if (state.snapshot_count == 0) {
        const auto file_size = TRY(metadata.addressable_bytes());
        return !is_aligned(state.snapshot_table.value, metadata.cluster_size()) ||
               state.snapshot_table.value > file_size;
    }
    const auto snapshots = read_snapshots(metadata);
    if (!snapshots) return false;
    return std::ranges::any_of(snapshots->entries, [](const format::SnapshotEntry& entry) {
        const std::size_t names = entry.info.id.size() + entry.info.name.size();
        return entry.encoded_bytes > align_down(fixed_snapshot_bytes + max_snapshot_extra_bytes + names + 7, 8);
    });
}

Result<RepairedHeader> repair_directories(const Metadata& metadata, const RepairPlan& plan, NewClusters& added,
                                          Storage& file) {
    return DirectoryRepair(metadata, plan, added, file).run();
}

Result<RemovedBitmaps> remove_inconsistent_bitmaps(const Metadata& metadata, NewClusters& added, Storage& file) {
    if (!metadata.state().bitmaps_consistent()) return RemovedBitmaps{};
    const RepairPlan nothing_else;
    return DirectoryRepair(metadata, nothing_else, added, file).remove_inconsistent();
}

Result<std::vector<std::vector<std::byte>>> header_steps(const Storage& file, const format::HeaderState& state) {
    format::HeaderEdit edit(TRY(read_first_cluster(file)));
    edit.set_state(state);
    return edit.steps();
}

Result<void> write_header(Storage& file, const std::vector<std::vector<std::byte>>& steps) {
    for (const auto& step : steps) {
        TRY_VOID(file.write({0}, step));
        TRY_VOID(file.flush());
    }
    return {};
}

}  // namespace qcow::qcow2
