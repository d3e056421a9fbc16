#include "qcow2/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "base/going_on.h"
#include "base/workers.h"
#include "format/luks.h"
#include "format/refcount.h"
#include "qcow/text.h"
#include "qcow2/findings.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/reference_map.h"

namespace qcow::qcow2 {
namespace {

using format::ClusterKind;
using format::L1Entry;
using format::L2Entry;
using Severity = CheckFinding::Severity;

constexpr std::uint64_t piece_bytes = 64 * KiB;

/// Of names in what is found, in bytes: enough to tell most of them apart; snapshots may have 65535.
constexpr std::size_t max_name = 100;

/// An L2 table and who refers to it.
struct L2Reference {
    HostOffset table;
    std::uint64_t l1_index = 0;
    std::uint64_t count = 1;
    bool active = false;  // from the active L1 table
};

/// What the walk over the active mapping adds up.
struct Tally {
    std::uint64_t allocated = 0;
    std::uint64_t compressed = 0;
    std::uint64_t fragmented = 0;
};

class Checker {
public:
    Checker(const Metadata& metadata, const Storage* data_file, const CheckOptions& options, std::uint64_t file_size,
            ReferenceMap& references)
        : metadata_(metadata),
          state_(metadata.state()),
          data_file_(data_file),
          options_(options),
          geometry_(metadata.geometry()),
          dirty_(state_.has(format::incompatible::dirty)),
          file_size_(file_size),
          file_clusters_(geometry_.clusters(file_size)),
          references_(references),
          findings_(options.max_findings),
          workers_(options.workers == 0 ? default_workers() : options.workers) {}

    /// Fills the map of references.
    Result<void> count() {
        TRY_VOID(add_table("header", {0}, 1));
        if (auto there = format::verify_refcount_table(state_, geometry_.cluster_bits, file_size_); !there) {
            has_refcounts_ = false;
            corrupt(0, there.error().place, there.error().what + "; no refcount was compared");
        } else {
            TRY_VOID(add_table("refcount table", state_.refcount_table,
                               std::uint64_t{state_.refcount_table_clusters} << geometry_.cluster_bits));
        }
        TRY_VOID(add_encryption());
        TRY_VOID(verify_data_file());
        if ((state_.autoclear & format::autoclear::raw_external_data) != 0 && !metadata_.rules().external_data) {
            corrupt(0, "header field autoclear_features (byte 88)", "raw external data without an external data file");
        }
        TRY_VOID(add_refcount_blocks());
        TRY_VOID(add_bitmaps());
        const auto active = [&] { return fmt::format("active L1 table at host offset {:#x}", state_.l1_table.value); };
        TRY_VOID(add_l1_table(active, state_.l1_table, state_.l1_entries, true));
        TRY_VOID(add_snapshots());
        merge_l2_references();
        return walk_l2_tables();
    }

    Result<CheckReport> run() {
        TRY_VOID(count());
        TRY_VOID(compare_refcounts());

        CheckReport report;
        report.dirty = dirty_;
        report.counted_past_end = counted_past_end_;
        report.total_clusters = geometry_.clusters(state_.size);
        report.allocated_clusters = tally_.allocated;
        report.compressed_clusters = tally_.compressed;
        report.fragmented_clusters = tally_.fragmented;
        report.image_end = image_end_clusters_ * geometry_.cluster_size();
        findings_.move_to(report);
        return report;
    }

    /// Errc::corrupt where a write could destroy what something else refers to; the place is the first in the file.
    Result<void> verify_counted() {
        TRY_VOID(count());
        TRY_VOID(compare_refcounts());
        if (!undercounted_) return {};
        return fail(Errc::corrupt, undercounted_->second.place, undercounted_->second.what);
    }

    /// Errc::corrupt with the first thing that was wrong, if anything was.
    Result<void> verify_nothing_found() {
        CheckReport report;
        findings_.move_to(report);
        if (report.corruptions == 0 && report.errors == 0) return {};
        const auto& first = report.findings.front();
        return fail(Errc::corrupt, first.place, first.what);
    }

private:
    /// `place` and `what`: texts, or functions that make them (Findings::add); so are the names of tables below.
    template <class Place, class What>
    void corrupt(std::uint64_t order, const Place& place, const What& what, std::uint64_t count = 1) {
        findings_.add(Severity::corruption, order, place, what, count);
    }

    /// The same of something that leads to other clusters, and cannot be followed: what lies there is not counted.
    template <class Place, class What>
    void corrupt_way(std::uint64_t order, const Place& place, const What& what, std::uint64_t count = 1) {
        uncounted_ = true;
        corrupt(order, place, what, count);
    }

    /// Whether something is wrong with the image, and not with looking at it.
    static bool is_flaw(const Error& error) { return error.code != Errc::io && error.code != Errc::no_memory; }

    static auto reserved_bits(std::uint64_t word) {
        return [word] { return fmt::format("reserved bits are set ({:#x})", word); };
    }

    /// Counts metadata in each cluster that [begin, begin + bytes) touches; false, and a finding, if it is not in the
    /// file.
    template <class What>
    Result<bool> add_range(const What& what, HostOffset begin, std::uint64_t bytes) {
        if (begin.value >= file_size_ || bytes > file_clusters_ * geometry_.cluster_size() - begin.value) {
            corrupt_way(begin.value, what, [&] {
                return fmt::format("its {} bytes at host offset {:#x} reach past the end of the file ({} bytes)", bytes,
                                   begin.value, file_size_);
            });
            return false;
        }
        const std::uint64_t first = begin.value >> geometry_.cluster_bits;
        const std::uint64_t last = (begin.value + bytes - 1) >> geometry_.cluster_bits;
        TRY_VOID(references_.add(first, last - first + 1, 1, References::metadata));
        return true;
    }

    template <class What>
    Result<bool> add_table(const What& what, HostOffset begin, std::uint64_t bytes) {
        if (bytes == 0) return true;
        if (!is_aligned(begin.value, geometry_.cluster_size())) {
            corrupt_way(begin.value, what, [&] {
                return fmt::format("host offset {:#x} is not a multiple of the cluster size", begin.value);
            });
            return false;
        }
        return add_range(what, begin, bytes);
    }

    /// The same for a table that is going to be walked; false, and a finding, also if part of it was counted before. So
    /// nothing is walked twice, however many tables are said to lie in one place.
    template <class What>
    Result<bool> add_table_to_walk(const What& what, HostOffset begin, std::uint64_t bytes) {
        const std::uint64_t first = begin.value >> geometry_.cluster_bits;
        const std::uint64_t clusters = std::min(geometry_.clusters(bytes), file_clusters_);
        const std::uint64_t taken = references_.next_used(first, first + clusters);
        if (taken >= first + clusters || taken >= references_.clusters()) return add_table(what, begin, bytes);
        corrupt_way(begin.value, what, [&] {
            return fmt::format("its {} bytes at host offset {:#x} overlap other metadata at {:#x}", bytes, begin.value,
                               taken << geometry_.cluster_bits);
        });
        // What comes before is taken now as well, so that finding the overlap takes no time the next time.
        TRY_VOID(references_.add(first, taken - first + 1, 1, References::metadata));
        return false;
    }

    /// Calls `visit(index, word)` for each word of a table that lies in the file. Holes are zeros and are not read.
    template <class Visit>
    Result<void> each_word(HostOffset table, std::uint64_t entries, Visit visit) {
        std::vector<std::byte> buffer(std::min(entries * 8, piece_bytes));
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

    Result<void> add_encryption() {
        if (!metadata_.header().encryption) return {};
        const auto& extension = *metadata_.header().encryption;
        if (TRY(add_table("encryption header", extension.offset, extension.length)) &&
            extension.length < format::luks1_header_bytes) {
            corrupt(extension.offset.value, "encryption header",
                    fmt::format("{} bytes are too few for a LUKS header", extension.length));
        }
        return {};
    }

    Result<void> verify_data_file() {
        if (!metadata_.rules().external_data || data_file_ == nullptr) return {};
        data_file_size_ = TRY(data_file_->size());
        const bool raw = (state_.autoclear & format::autoclear::raw_external_data) != 0;
        if (raw && *data_file_size_ < state_.size) {
            corrupt(0, "header field size (byte 24)", [&] {
                return fmt::format("the disk has {} bytes, but its raw data file {} only {}: the file was cut",
                                   state_.size, printable(data_file_->name()), *data_file_size_);
            });
        }
        return {};
    }

    Result<void> add_refcount_blocks() {
        if (!has_refcounts_) return {};
        blocks_.resize((std::uint64_t{state_.refcount_table_clusters} << geometry_.cluster_bits) / 8);
        return each_word(
            state_.refcount_table, blocks_.size(), [&](std::uint64_t index, std::uint64_t word) -> Result<void> {
                const format::RefcountTableEntry entry{word};
                const auto place = [&] { return fmt::format("refcount table entry {}", index); };
                if (entry.reserved_bits_set()) {
                    corrupt(state_.refcount_table.value + index * 8, place, reserved_bits(word));
                }
                if (!entry.allocated()) return {};
                const std::uint64_t cluster = entry.block().value >> geometry_.cluster_bits;
                if (is_aligned(entry.block().value, geometry_.cluster_size()) && cluster < file_clusters_) {
                    TRY_VOID(references_.add(cluster, 1, 1, References::metadata));
                    blocks_[index] = entry.block();
                    return {};
                }
                const auto block_place = [&] { return place() + ": refcount block"; };
                TRY(add_table(block_place, entry.block(), geometry_.cluster_size()));  // says why not
                return {};
            });
    }

    Result<void> add_bitmaps() {
        if (!metadata_.header().bitmaps_consistent(state_)) return {};
        const auto& extension = *metadata_.header().bitmaps;
        auto bitmaps = read_bitmaps(metadata_);
        if (!bitmaps) {
            if (!is_flaw(bitmaps.error())) return std::unexpected(std::move(bitmaps).error());
            corrupt_way(extension.directory.value, bitmaps.error().place, bitmaps.error().what);
            return {};
        }
        TRY(add_table("bitmap directory", extension.directory, extension.directory_size));
        std::set<std::string_view> names;
        for (const auto& bitmap : *bitmaps) {
            if (!names.insert(bitmap.info.name).second) {
                corrupt(extension.directory.value, "bitmap directory",
                        fmt::format("there is more than one bitmap \"{}\"", printable(bitmap.info.name, max_name)));
            }
            TRY_VOID(add_bitmap(bitmap));
        }
        return {};
    }

    Result<void> add_bitmap(const format::BitmapEntry& bitmap) {
        const auto place = [&] {
            return fmt::format("bitmap \"{}\" (table at host offset {:#x})", printable(bitmap.info.name, max_name),
                               bitmap.table.value);
        };
        const std::uint64_t bits_per_entry = geometry_.cluster_size() * 8;
        const auto needed = divide_up(divide_up(state_.size, bitmap.info.granularity), bits_per_entry);
        if (!bitmap.info.in_use && bitmap.table_entries != needed) {
            corrupt(bitmap.table.value, place, [&] {
                return fmt::format("its table has {} entries, but the disk needs {}", bitmap.table_entries, needed);
            });
        }
        const auto table_place = [&] { return place() + ": table"; };
        if (!TRY(add_table_to_walk(table_place, bitmap.table, std::uint64_t{bitmap.table_entries} * 8))) return {};
        return each_word(bitmap.table, bitmap.table_entries,
                         [&](std::uint64_t index, std::uint64_t word) -> Result<void> {
                             const format::BitmapTableEntry entry{word};
                             const auto entry_place = [&] { return fmt::format("{}: table entry {}", place(), index); };
                             if (entry.reserved_bits_set()) {
                                 corrupt(bitmap.table.value + index * 8, entry_place, reserved_bits(word));
                             }
                             if (entry.cluster().value != 0) TRY(add_table(entry_place, entry.cluster(), geometry_.cluster_size()));
                             return {};
                         });
    }

    Result<void> add_snapshots() {
        auto table = read_snapshots(metadata_);
        if (!table) {
            if (!is_flaw(table.error())) return std::unexpected(std::move(table).error());
            corrupt_way(state_.snapshot_table.value, table.error().place, table.error().what);
            return {};
        }
        TRY(add_table("snapshot table", state_.snapshot_table, table->bytes));
        for (const auto& snapshot : table->entries) {
            const auto place = [&] {
                return fmt::format("L1 table of snapshot \"{}\" at host offset {:#x}",
                                   printable(snapshot.info.name, max_name), snapshot.l1_table.value);
            };
            if (auto verified = verify_snapshot_l1(metadata_, snapshot); !verified) {
                if (!is_flaw(verified.error())) return verified;
                corrupt_way(snapshot.l1_table.value, place, verified.error().what);
                continue;
            }
            TRY_VOID(add_l1_table(place, snapshot.l1_table, snapshot.l1_entries, false));
        }
        return {};
    }

    template <class What>
    Result<void> add_l1_table(const What& what, HostOffset table, std::uint64_t entries, bool active) {
        if (!TRY(add_table_to_walk(what, table, entries * 8))) return {};
        return each_word(table, entries, [&](std::uint64_t index, std::uint64_t word) -> Result<void> {
            const L1Entry entry{word};
            const auto place = [&] { return fmt::format("{}: entry {}", what(), index); };
            if (entry.reserved_bits_set()) corrupt(table.value + index * 8, place, reserved_bits(word));
            if (!entry.allocated()) {
                if (entry.copied()) corrupt(table.value + index * 8, place, "COPIED, but there is no L2 table");
                return {};
            }
            if (!is_aligned(entry.l2_table().value, geometry_.cluster_size())) {
                corrupt_way(table.value + index * 8, place, [&] {
                    return fmt::format("the L2 table's offset {:#x} is not a multiple of the cluster size",
                                       entry.l2_table().value);
                });
                return {};
            }
            if (!lies_within(entry.l2_table().value, geometry_.cluster_size(), file_size_)) {
                corrupt_way(table.value + index * 8, place, [&] {
                    return fmt::format("the L2 table at {:#x} reaches past the end of the file ({} bytes)",
                                       entry.l2_table().value, file_size_);
                });
                return {};
            }
            const auto copied = !active ? 0 : entry.copied() ? References::copied : References::not_copied;
            TRY_VOID(references_.add(entry.l2_table().value >> geometry_.cluster_bits, 1, 1, References::l2_table | copied));
            // A vector that grows holds old and new, twice as large, for a while.
            if (l2_references_.size() == l2_references_.capacity() &&
                l2_references_.size() * 3 * sizeof(L2Reference) > options_.memory_bytes) {
                return fail(Errc::limit_exceeded, "",
                            "the image has more L2 tables than fit in the memory that was allowed");
            }
            l2_references_.push_back({entry.l2_table(), index, 1, active});
            return {};
        });
    }

    /// Shared tables become one entry, in the order of the file.
    void merge_l2_references() {
        std::ranges::sort(l2_references_, [](const auto& a, const auto& b) {
            return std::pair(a.table, !a.active) < std::pair(b.table, !b.active);
        });
        std::size_t kept = 0;
        for (std::size_t i = 0; i < l2_references_.size(); ++i) {
            if (i != 0 && l2_references_[i].table == l2_references_[kept - 1].table) {
                l2_references_[kept - 1].count += l2_references_[i].count;
            } else {
                l2_references_[kept++] = l2_references_[i];
            }
        }
        l2_references_.resize(kept);
    }

    Result<void> walk_l2_tables() {
        std::atomic<std::size_t> next = 0;
        std::mutex mutex;
        return run_workers(workers_, [&](unsigned) -> Result<void> {
            std::vector<std::byte> buffer(geometry_.cluster_size());
            Tally tally;
            for (std::size_t i = next++; i < l2_references_.size(); i = next++) {
                TRY_VOID(verify_goes_on(options_.control));
                TRY_VOID(walk_l2_table(l2_references_[i], buffer, tally));
                if (options_.control.progress && i % 16 == 0) {
                    const std::lock_guard lock(mutex);
                    options_.control.progress(i * buffer.size(), l2_references_.size() * buffer.size());
                }
            }
            const std::lock_guard lock(mutex);
            tally_.allocated += tally.allocated;
            tally_.compressed += tally.compressed;
            tally_.fragmented += tally.fragmented;
            return {};
        });
    }

    Result<void> walk_l2_table(const L2Reference& reference, std::span<std::byte> buffer, Tally& tally) {
        if (TRY(is_hole(reference.table, buffer.size()))) return {};
        TRY(metadata_.file().read(reference.table, buffer));
        HostOffset contiguous{0};
        const auto entries = std::span<const std::byte>(buffer);
        for (std::uint64_t index = 0; index < geometry_.l2_entries();) {
            const L2Entry entry = entry_at(entries, index);
            const std::uint64_t count = entry.compressed() ? 1 : count_contiguous(entries, index, entry);
            if (entry.word != 0 || entry.bitmap != 0) {
                TRY_VOID(add_l2_entries(reference, index, count, entry, contiguous, tally));
            }
            index += count;
        }
        return {};
    }

    [[nodiscard]] L2Entry entry_at(std::span<const std::byte> table, std::uint64_t index) const {
        if (!geometry_.extended_l2) return {load_be<std::uint64_t>(table, index * 8)};
        return {load_be<std::uint64_t>(table, index * 16), load_be<std::uint64_t>(table, index * 16 + 8)};
    }

    /// How many entries from `index` on are alike and name host clusters one behind the other, or none at all.
    [[nodiscard]] std::uint64_t count_contiguous(std::span<const std::byte> table, std::uint64_t index,
                                                 L2Entry entry) const {
        const std::uint64_t step = metadata_.rules().has_cluster(entry) ? geometry_.cluster_size() : 0;
        std::uint64_t count = 1;
        for (L2Entry expected{entry.word + step, entry.bitmap}; index + count < geometry_.l2_entries();
             expected.word += step, ++count) {
            const L2Entry next = entry_at(table, index + count);
            if (next.word != expected.word || next.bitmap != expected.bitmap) break;
        }
        return count;
    }

    /// `count` entries from `index` on, of which `entry` is the first and the others are alike.
    Result<void> add_l2_entries(const L2Reference& reference, std::uint64_t index, std::uint64_t count, L2Entry entry,
                                HostOffset& contiguous, Tally& tally) {
        const GuestOffset guest{reference.l1_index * geometry_.l2_coverage() + (index << geometry_.cluster_bits)};
        const std::uint64_t entry_offset = reference.table.value + index * geometry_.entry_words() * 8;
        const auto place = [&] {
            return fmt::format("L2 entry at host offset {:#x} (guest offset {:#x})", entry_offset, guest.value);
        };
        if (const auto flaw = metadata_.rules().flaw(entry)) {
            const auto what = [&] { return fmt::format("{} ({:#018x})", flaw->what, entry.word); };
            if (flaw->unreadable) {
                corrupt_way(entry_offset, place, what, count);
                return {};
            }
            corrupt(entry_offset, place, what, count);
        }
        if (entry.compressed()) {
            const auto range = entry.compressed_range(geometry_.cluster_bits);
            if (reference.active) {
                ++tally.allocated;
                ++tally.compressed;
                ++tally.fragmented;
            }
            return add_compressed(place, range, reference.count);
        }
        if (!metadata_.rules().has_cluster(entry)) return {};
        if (reference.active) {
            tally.allocated += count;
            if (contiguous.value != 0 && entry.cluster() != contiguous) ++tally.fragmented;
            contiguous = entry.cluster() + count * geometry_.cluster_size();
        }
        if (metadata_.rules().external_data) {
            // Nobody shares the data file's clusters.
            if (!entry.copied()) corrupt(entry_offset, place, "not marked COPIED", count);
            if (entry.cluster().value != guest.value) {
                const auto what = [&] {
                    return fmt::format("host offset {:#x} in the external data file is not the guest's",
                                       entry.cluster().value);
                };
                corrupt(entry_offset, place, what, count);
            }
            verify_in_data_file(place, entry_offset, entry, count);
            return {};
        }
        // A preallocated cluster may lie right behind the end of the file.
        const bool preallocated = metadata_.rules().run(entry, 0).kind == ClusterKind::zero_allocated;
        const std::uint64_t end = file_clusters_ + (preallocated ? 1 : 0);
        const std::uint64_t first = entry.cluster().value >> geometry_.cluster_bits;
        const std::uint64_t inside = first >= end ? 0 : std::min(count, end - first);
        if (inside < count) {
            const auto what = [&] {
                return fmt::format("the cluster at host offset {:#x} lies past the end of the file ({} bytes)",
                                   (first + inside) << geometry_.cluster_bits, file_size_);
            };
            corrupt_way(entry_offset, place, what, count - inside);
        }
        const auto copied = !reference.active ? 0 : entry.copied() ? References::copied : References::not_copied;
        return references_.add(first, inside, reference.count, References::data | copied);
    }

    /// The data of `count` entries alike, one behind the other in the data file.
    template <class Place>
    void verify_in_data_file(Place place, std::uint64_t entry_offset, L2Entry entry, std::uint64_t count) {
        const std::uint64_t cluster_size = geometry_.cluster_size();
        const std::uint64_t first = entry.cluster().value;
        const std::uint64_t disk_end = state_.size;
        if (!data_file_size_ || *data_file_size_ >= disk_end || first >= disk_end) return;
        std::uint64_t used = metadata_.rules().run(entry, 0).kind == ClusterKind::data ? cluster_size : 0;
        if (geometry_.extended_l2) {
            const auto allocated = static_cast<std::uint32_t>(entry.bitmap);
            used = static_cast<std::uint64_t>(std::bit_width(allocated)) << geometry_.subcluster_bits();
        }
        if (used == 0) return;
        const std::uint64_t wanted = std::min(count, geometry_.clusters(disk_end - first));
        const std::uint64_t there =
            *data_file_size_ < first + used ? 0 : (*data_file_size_ - first - used) / cluster_size + 1;
        if (there >= wanted) return;
        const auto what = [&] {
            return fmt::format(
                "the cluster at host offset {:#x} lies past the end of the external data file ({} bytes)",
                first + there * cluster_size, *data_file_size_);
        };
        corrupt(entry_offset, place, what, wanted - there);
    }

    template <class Place>
    Result<void> add_compressed(Place place, const format::CompressedRange& range, std::uint64_t count) {
        if (range.offset.value >= file_size_) {
            corrupt_way(range.offset.value, place, [&] {
                return fmt::format(
                    "the compressed cluster at host offset {:#x} lies past the end of the file ({} bytes)",
                    range.offset.value, file_size_);
            });
            return {};
        }
        // Its last sectors may reach past the end of the file, within the file's last cluster.
        const std::uint64_t first = range.offset.value >> geometry_.cluster_bits;
        const std::uint64_t last = (range.offset.value + range.length - 1) >> geometry_.cluster_bits;
        if (last >= file_clusters_) {
            corrupt(range.offset.value, place, [&] {
                return fmt::format(
                    "the compressed cluster at host offset {:#x} reaches past the end of the file ({} bytes)",
                    range.offset.value, file_size_);
            });
        }
        return references_.add(first, std::min(last, file_clusters_ - 1) - first + 1, count, References::compressed);
    }

    Result<void> compare_refcounts() {
        if (!has_refcounts_) {
            for (std::uint64_t i = 0; (i = references_.next_used(i, references_.clusters())) < references_.clusters();)
                image_end_clusters_ = ++i;
            return {};
        }
        report_overlapping_blocks();
        std::atomic<std::size_t> next = 0;
        const std::uint64_t per_block =
            format::refcounts_per_block(geometry_.cluster_bits, metadata_.header().refcount_order);
        std::mutex mutex;
        TRY_VOID(run_workers(
            workers_,
            [&](unsigned) -> Result<void> {
                std::vector<std::byte> buffer(geometry_.cluster_size());
                std::uint64_t end = 0;
                for (std::size_t i = next++; i < blocks_.size(); i = next++) {
                    TRY_VOID(verify_goes_on(options_.control));
                    TRY_VOID(compare_block(i * per_block, per_block, blocks_[i], buffer, end));
                }
                const std::lock_guard lock(mutex);
                image_end_clusters_ = std::max(image_end_clusters_, end);
                return {};
            }));
        compare_with_zero(blocks_.size() * per_block, references_.clusters(), image_end_clusters_);
        return {};
    }

    /// What a block says cannot be believed if something else lies there, too.
    [[nodiscard]] bool overlaps(HostOffset block) const {
        return block.value != 0 && references_.at(block.value >> geometry_.cluster_bits).count() != 1;
    }

    /// One finding for all of them: a million entries may name one block.
    void report_overlapping_blocks() {
        const auto count = static_cast<std::uint64_t>(
            std::ranges::count_if(blocks_, [this](HostOffset block) { return overlaps(block); }));
        if (count == 0) return;
        const auto first = std::ranges::find_if(blocks_, [this](HostOffset block) { return overlaps(block); });
        note_undercounted(
            first->value, [&] { return fmt::format("refcount block at host offset {:#x}", first->value); },
            [] { return std::string("something else lies there, too, so that its refcounts cannot be believed"); });
        corrupt(first->value, fmt::format("refcount table entry {}", first - blocks_.begin()),
                fmt::format("overlap: the block at host offset {:#x} is in use as something else, or for another "
                            "entry, so that it was not believed; there are {} such entries",
                            first->value, count),
                count);
    }

    /// The clusters that one block describes, `per_block` from `first` on.
    Result<void> compare_block(std::uint64_t first, std::uint64_t per_block, HostOffset block,
                               std::span<std::byte> buffer, std::uint64_t& end) {
        if (overlaps(block)) return {};
        const std::uint64_t last = first + per_block;
        if (block.value == 0 || TRY(is_hole(block, buffer.size()))) {
            compare_with_zero(first, last, end);
            return {};
        }
        TRY(metadata_.file().read(block, buffer));
        const auto refcounts = std::span<const std::byte>(buffer);
        const unsigned order = metadata_.header().refcount_order;
        for (std::uint64_t cluster = first; cluster < last;) {
            const auto [piece, references] = piece_from(cluster, last);
            // Most of a block is zeros where it describes what lies past the end of the file.
            const auto bits_before = (cluster - first) << order;
            if (references.empty() && is_zero(refcounts.subspan(bits_before / 8, (piece << order) / 8))) {
                cluster += piece;
                continue;
            }
            for (std::uint64_t i = 0; i < piece; ++i, ++cluster) {
                const auto refcount = format::refcount_at(refcounts, cluster - first, order);
                compare(cluster, refcount, references.empty() ? References{} : references[i], end);
            }
        }
        return {};
    }

    /// Clusters without a refcount block.
    void compare_with_zero(std::uint64_t first, std::uint64_t last, std::uint64_t& end) {
        last = std::min(last, references_.clusters());
        while ((first = references_.next_used(first, last)) < last) {
            compare(first, 0, references_.at(first), end);
            ++first;
        }
    }

    /// As many of the clusters from `first` to `last` - 1 as lie in one chunk of the map, or would lie in one behind
    /// its end, and their references (none: an empty span).
    [[nodiscard]] std::pair<std::uint64_t, std::span<const References>> piece_from(std::uint64_t first,
                                                                                   std::uint64_t last) const {
        const std::uint64_t chunk_end = align_down(first, ReferenceMap::chunk_clusters) + ReferenceMap::chunk_clusters;
        const std::uint64_t piece = std::min(last, chunk_end) - first;
        if (first >= references_.clusters()) return {piece, {}};
        return {piece, references_.chunk_from(first)};
    }

    [[nodiscard]] Result<bool> is_hole(HostOffset at, std::uint64_t bytes) const {
        const auto run = TRY(metadata_.file().run(at, bytes));
        return !run.data && run.length == bytes;
    }

    void compare(std::uint64_t cluster, std::uint64_t refcount, References references, std::uint64_t& end) {
        if (references.word == 0) {
            if (refcount == 0) return;
            if (cluster >= file_clusters_) {
                ++counted_past_end_;
                return;
            }
        }
        end = std::max(end, cluster + 1);
        const std::uint64_t counted = references.count();
        const std::uint32_t uses = references.word & References::uses;
        const bool overlaps = (uses & (uses - 1)) != 0 || ((uses & References::metadata) != 0 && counted > 1);
        const auto wrong_mark = refcount == 1 ? References::not_copied : References::copied;
        if (std::min<std::uint64_t>(refcount, References::max_count) != counted || overlaps ||
            (references.word & wrong_mark) != 0) {
            report(cluster, refcount, references);
        }
    }

    void report(std::uint64_t cluster, std::uint64_t refcount, References references) {
        const std::uint64_t at = cluster << geometry_.cluster_bits;
        const auto place = [&] { return fmt::format("host cluster at {:#x}", at); };
        const std::uint64_t counted = references.count();
        const auto uses = references.word & References::uses;
        if (std::popcount(uses) > 1 || ((uses & References::metadata) != 0 && counted > 1)) {
            corrupt(at, place, [&] {
                return fmt::format("overlap: it is used as {}, {} times in all", use_names(uses), counted);
            });
        }
        const std::uint64_t stored = refcount;
        const std::uint64_t comparable = std::min<std::uint64_t>(stored, References::max_count);
        if (comparable > counted && uncounted_) {
            findings_.add(Severity::error, at, place, [&] {
                return fmt::format(
                    "could not be counted: refcount {}, and {} references that are known; it may belong "
                    "to what is damaged",
                    stored, counted);
            });
        } else if (comparable != counted && dirty_ &&
                   counted <= format::max_refcount(metadata_.header().refcount_order)) {
            findings_.add(Severity::postponed, at, place,
                          [&] { return fmt::format("refcount {}, but {} references", stored, counted); });
            refcount = counted;  // as it will be
        } else if (comparable < counted) {
            const auto what = [&] {
                return fmt::format("refcount {} is less than its {} references ({})", stored, counted, use_names(uses));
            };
            corrupt(at, place, what);
            note_undercounted(at, place, what);
        } else if (comparable > counted) {
            findings_.add(Severity::leak, at, place,
                          [&] { return fmt::format("leaked: refcount {}, but {} references", stored, counted); });
        }
        const auto* const table = uses == References::l2_table ? "L1" : "L2";
        if (refcount != 1 && (references.word & References::copied) != 0) {
            const auto what = [&] {
                return fmt::format("its {} entry is marked COPIED, but its refcount is {}", table, refcount);
            };
            corrupt(at, place, what);
            if (counted > 1) note_undercounted(at, place, what);
        }
        if (refcount == 1 && (references.word & References::not_copied) != 0) {
            corrupt(at, place,
                    [&] { return fmt::format("its {} entry is not marked COPIED, but its refcount is 1", table); });
        }
    }

    template <class Place, class What>
    void note_undercounted(std::uint64_t order, const Place& place, const What& what) {
        const std::lock_guard lock(undercounted_mutex_);
        if (undercounted_ && undercounted_->first <= order) return;
        undercounted_.emplace(order, Error{Errc::corrupt, place(), what()});
    }

    static std::string use_names(std::uint32_t uses) {
        std::string names;
        const auto add = [&](std::uint32_t use, std::string_view name) {
            if ((uses & use) != 0) names += (names.empty() ? "" : " and ") + std::string(name);
        };
        add(References::metadata, "metadata");
        add(References::l2_table, "L2 table");
        add(References::data, "data");
        add(References::compressed, "compressed data");
        return names;
    }

    const Metadata& metadata_;
    const format::HeaderState state_;
    const Storage* data_file_;
    const CheckOptions& options_;
    const format::Geometry& geometry_;
    const bool dirty_;
    std::uint64_t file_size_;
    std::uint64_t file_clusters_;
    ReferenceMap& references_;
    Findings findings_;
    unsigned workers_;

    bool has_refcounts_ = true;
    std::vector<HostOffset> blocks_;  // by index in the refcount table; 0: none, or one that cannot be read
    std::vector<L2Reference> l2_references_;
    Tally tally_;
    std::atomic<std::uint64_t> counted_past_end_ = 0;
    std::atomic<bool> uncounted_ = false;          // there is more that refers to clusters than could be followed
    std::optional<std::uint64_t> data_file_size_;  // of an external data file that was opened
    std::uint64_t image_end_clusters_ = 0;
    std::mutex undercounted_mutex_;
    std::optional<std::pair<std::uint64_t, Error>> undercounted_;  // the first in the file, and where it lies
};

}  // namespace

namespace {

/// The length of the file; with an L1 table that was left out at its end.
Result<std::uint64_t> file_size_of(const Metadata& metadata) {
    const std::uint64_t there = TRY(metadata.file().size());
    const auto state = metadata.state();
    return metadata.l1_left_out() ? std::max(there, state.l1_table.value + std::uint64_t{state.l1_entries} * 8) : there;
}

Result<std::unique_ptr<ReferenceMap>> empty_map(const Metadata& metadata, std::uint64_t file_size,
                                                const CheckOptions& options) {
    // One more than the file has: a preallocated cluster may lie right behind its end.
    auto references = ReferenceMap::create(metadata.geometry().clusters(file_size) + 1, options.memory_bytes);
    if (!references) return std::unexpected(std::move(references).error().in("check").in(metadata.file().name()));
    return references;
}

}  // namespace

Result<std::unique_ptr<ReferenceMap>> count_references(const Metadata& metadata, const CheckOptions& options) {
    const auto file_size = TRY(file_size_of(metadata));
    auto references = TRY(empty_map(metadata, file_size, options));
    Checker checker(metadata, nullptr, options, file_size, *references);
    TRY_VOID(checker.count());
    TRY_VOID(checker.verify_nothing_found());
    return references;
}

Result<void> verify_counted(const Metadata& metadata, const CheckOptions& options) {
    const auto file_size = TRY(metadata.file().size());
    const auto references = TRY(empty_map(metadata, file_size, options));
    return Checker(metadata, nullptr, options, file_size, *references).verify_counted();
}

Result<CheckReport> check_image(const Metadata& metadata, const Storage* data_file, const CheckOptions& options) {
    const auto file_size = TRY(file_size_of(metadata));
    const auto references = TRY(empty_map(metadata, file_size, options));
    auto report = Checker(metadata, data_file, options, file_size, *references).run();
    if (!report) return std::unexpected(std::move(report).error().in("check"));
    return report;
}

}  // namespace qcow::qcow2
