#include "qcow2/l2_walk.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <mutex>

#include "base/bits.h"
#include "base/endian.h"
#include "base/going_on.h"
#include "base/workers.h"

namespace qcow::qcow2 {

using format::ClusterKind;
using format::L2Entry;

namespace {

L2Entry entry_at(const format::Geometry& geometry, std::span<const std::byte> table, std::uint64_t index) {
    if (!geometry.extended_l2) return {load_be<std::uint64_t>(table, index * 8)};
    return {load_be<std::uint64_t>(table, index * 16), load_be<std::uint64_t>(table, index * 16 + 8)};
}

/// How many entries from `index` on are alike and name host clusters one behind the other, or none at all.
std::uint64_t count_contiguous(const format::EntryRules& rules, std::span<const std::byte> table, std::uint64_t index,
                               L2Entry entry) {
    const std::uint64_t step = rules.has_cluster(entry) ? rules.geometry.cluster_size() : 0;
    std::uint64_t count = 1;
    for (L2Entry expected{entry.word + step, entry.bitmap}; index + count < rules.geometry.l2_entries();
         expected.word += step, ++count) {
        if (entry_at(rules.geometry, table, index + count) != expected) break;
    }
    return count;
}

}  // namespace

L2Walk::L2Walk(const Metadata& metadata, std::uint64_t file_bytes, const WalkOptions& options, Visitor& visitor)
    : metadata_(metadata),
      geometry_(metadata.geometry()),
      rules_(metadata.rules()),
      options_(options),
      visitor_(visitor),
      file_size_(file_bytes),
      file_clusters_(geometry_.clusters(file_bytes)),
      disk_size_(metadata.state().size) {}

Result<void> L2Walk::add(HostOffset table, std::uint64_t l1_index, bool active) {
    // A vector that grows holds old and new, twice as large, for a while.
    if (tables_.size() == tables_.capacity() && tables_.size() * 3 * sizeof(Table) > options_.memory_bytes)
        return fail(Errc::limit_exceeded, "", "the image has more L2 tables than fit in the memory that was allowed");
    tables_.push_back({table, l1_index, 1, active});
    return {};
}

/// Shared tables become one entry, in the order of the file.
void L2Walk::merge_shared_tables() {
    std::ranges::sort(
        tables_, [](const auto& a, const auto& b) { return std::pair(a.at, !a.active) < std::pair(b.at, !b.active); });
    std::size_t kept = 0;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
        if (i != 0 && tables_[i].at == tables_[kept - 1].at) {
            tables_[kept - 1].count += tables_[i].count;
        } else {
            tables_[kept++] = tables_[i];
        }
    }
    tables_.resize(kept);
}

Result<MappedClusters> L2Walk::visit(std::optional<std::uint64_t> data_file_bytes) {
    data_file_size_ = data_file_bytes;
    merge_shared_tables();
    MappedClusters all;
    if (tables_.empty()) return all;
    std::atomic<std::size_t> next = 0;
    std::mutex mutex;
    TRY_VOID(run_workers(
        options_.workers == 0 ? default_workers() : options_.workers,
        [&](unsigned) -> Result<void> {
            std::vector<std::byte> buffer(geometry_.cluster_size());
            MappedClusters mapped;
            for (std::size_t i = next++; i < tables_.size(); i = next++) {
                TRY_VOID(verify_goes_on(options_.control));
                TRY_VOID(visit_table(tables_[i], buffer, mapped));
                if (options_.control.progress && i % 16 == 0) {
                    const std::lock_guard lock(mutex);
                    options_.control.progress(i * buffer.size(), tables_.size() * buffer.size());
                }
            }
            const std::lock_guard lock(mutex);
            all.allocated += mapped.allocated;
            all.compressed += mapped.compressed;
            all.fragmented += mapped.fragmented;
            return {};
        }));
    return all;
}

Result<void> L2Walk::visit_table(const Table& table, std::span<std::byte> buffer, MappedClusters& mapped) {
    if (TRY(is_hole(metadata_.file(), table.at, buffer.size()))) return {};
    TRY(metadata_.file().read(table.at, buffer));
    HostOffset contiguous{0};
    const auto entries = std::span<const std::byte>(buffer);
    for (std::uint64_t index = 0; index < geometry_.l2_entries();) {
        const L2Entry entry = entry_at(geometry_, entries, index);
        const std::uint64_t count = entry.compressed() ? 1 : count_contiguous(rules_, entries, index, entry);
        if (entry.word != 0 || entry.bitmap != 0)
            TRY_VOID(visit_entries(table, index, count, entry, contiguous, mapped));
        index += count;
    }
    return {};
}

/// `count` entries from `index` on, of which `entry` is the first and the others are alike.
Result<void> L2Walk::visit_entries(const Table& table, std::uint64_t index, std::uint64_t count, L2Entry entry,
                                   HostOffset& contiguous, MappedClusters& mapped) {
    const GuestOffset guest{table.l1_index * geometry_.l2_coverage() + (index << geometry_.cluster_bits)};
    const Place place{.structure = Structure::l2_table,
                      .table = table.at,
                      .at = table.at + index * geometry_.entry_words() * 8,
                      .index = index,
                      .guest = guest,
                      .active = table.active};
    if (const auto flaw = rules_.flaw(entry, guest)) {
        TRY_VOID(report_entry(place, entry, *flaw, count));
        if (flaw->unreadable) return {};
    }
    if (entry.compressed()) {
        if (table.active) {
            ++mapped.allocated;
            ++mapped.compressed;
            ++mapped.fragmented;
        }
        return visit_compressed(table, place, entry);
    }
    if (!rules_.has_cluster(entry)) return {};
    if (table.active) {
        mapped.allocated += count;
        if (contiguous.value != 0 && entry.cluster() != contiguous) ++mapped.fragmented;
        contiguous = entry.cluster() + count * geometry_.cluster_size();
    }
    if (rules_.external_data) return verify_in_data_file(place, entry, count);
    return visit_data(table, place, entry, count);
}

Result<void> L2Walk::report_entry(const Place& place, L2Entry entry, const format::EntryFlaw& found,
                                  std::uint64_t count) {
    Flaw flaw{.kind = Flaw::Kind::contradiction,
              .place = place,
              .target = entry.compressed() ? Structure::compressed : Structure::data,
              .at = entry.cluster(),
              .word = entry.word,
              .detail = found.what,
              .count = count,
              .hides_references = found.unreadable && !rules_.external_data,
              .in_data_file = rules_.external_data};
    switch (found.kind) {
        case format::EntryFlaw::Kind::contradiction: break;
        case format::EntryFlaw::Kind::misplaced: flaw.kind = Flaw::Kind::misplaced; break;
        case format::EntryFlaw::Kind::misaligned: flaw.kind = Flaw::Kind::misaligned; break;
        case format::EntryFlaw::Kind::copied_flag: flaw.kind = Flaw::Kind::copied_flag; break;
        case format::EntryFlaw::Kind::reserved_bits: flaw.kind = Flaw::Kind::reserved_bits; break;
    }
    return visitor_.flaw(flaw);
}

Result<void> L2Walk::visit_data(const Table& table, const Place& place, L2Entry entry, std::uint64_t count) {
    const std::uint64_t cluster_size = geometry_.cluster_size();
    // A preallocated cluster may lie right behind the end of the file.
    const bool preallocated = rules_.run(entry, 0).kind == ClusterKind::zero_allocated;
    const std::uint64_t end = file_clusters_ + (preallocated ? 1 : 0);
    const std::uint64_t first = entry.cluster().value >> geometry_.cluster_bits;
    const std::uint64_t inside = first >= end ? 0 : std::min(count, end - first);
    if (inside < count) {
        TRY_VOID(visitor_.flaw({.kind = Flaw::Kind::past_end,
                                .place = place,
                                .target = Structure::data,
                                .at = entry.cluster() + inside * cluster_size,
                                .bytes = (count - inside) * cluster_size,
                                .limit = file_size_,
                                .word = entry.word,
                                .count = count - inside,
                                .hides_references = true}));
        if (inside == 0) return {};
    }
    return visitor_.reference({Structure::data, place, entry.cluster(), inside * cluster_size, table.count,
                               table.active, entry.copied(), entry.word});
}

/// The data of `count` entries alike, one behind the other in the data file.
Result<void> L2Walk::verify_in_data_file(const Place& place, L2Entry entry, std::uint64_t count) {
    Flaw flaw{.place = place, .at = entry.cluster(), .word = entry.word, .count = count, .in_data_file = true};
    // Nobody shares the data file's clusters.
    if (!entry.copied()) {
        flaw.kind = Flaw::Kind::copied_flag;
        TRY_VOID(visitor_.flaw(flaw));
    }
    const std::uint64_t cluster_size = geometry_.cluster_size();
    const std::uint64_t first = entry.cluster().value;
    if (!data_file_size_ || *data_file_size_ >= disk_size_ || first >= disk_size_) return {};
    std::uint64_t used = rules_.run(entry, 0).kind == ClusterKind::data ? cluster_size : 0;
    if (geometry_.extended_l2) {
        const auto allocated = static_cast<std::uint32_t>(entry.bitmap);
        used = static_cast<std::uint64_t>(std::bit_width(allocated)) << geometry_.subcluster_bits();
    }
    if (used == 0) return {};
    const std::uint64_t wanted = std::min(count, geometry_.clusters(disk_size_ - first));
    const std::uint64_t there =
        *data_file_size_ < first + used ? 0 : (*data_file_size_ - first - used) / cluster_size + 1;
    if (there >= wanted) return {};
    flaw.kind = Flaw::Kind::past_end;
    flaw.at += there * cluster_size;
    flaw.bytes = (wanted - there) * cluster_size;
    flaw.limit = *data_file_size_;
    flaw.count = wanted - there;
    return visitor_.flaw(flaw);
}

Result<void> L2Walk::visit_compressed(const Table& table, const Place& place, L2Entry entry) {
    const auto range = entry.compressed_range(geometry_.cluster_bits);
    Flaw flaw{.kind = Flaw::Kind::past_end,
              .place = place,
              .target = Structure::compressed,
              .at = range.offset,
              .bytes = range.length,
              .limit = file_size_,
              .word = entry.word};
    if (range.offset.value >= file_size_) {
        flaw.hides_references = true;
        return visitor_.flaw(flaw);
    }
    // Its last sectors may reach past the end of the file, within the file's last cluster.
    const std::uint64_t inside = file_clusters_ * geometry_.cluster_size() - range.offset.value;
    if (range.length > inside) TRY_VOID(visitor_.flaw(flaw));
    return visitor_.reference({Structure::compressed, place, range.offset, std::min(range.length, inside), table.count,
                               table.active, entry.copied(), entry.word});
}

}  // namespace qcow::qcow2
