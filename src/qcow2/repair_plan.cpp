#include "qcow2/repair_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>

#include "base/endian.h"
#include "base/try.h"
#include "format/refcount.h"
#include "format/tables.h"

namespace qcow::qcow2 {
namespace {

using format::L2Entry;

constexpr std::uint64_t allocated_subclusters = 0xffff'ffff;
constexpr std::uint64_t all_zero_subclusters = 0xffff'ffff'0000'0000;
constexpr std::size_t max_raw_losses = 100'000;

bool has_several_uses(std::uint32_t uses) { return (uses & (uses - 1)) != 0; }

class Planner final : public Visitor {
public:
    Planner(const Metadata& metadata, const Diagnosis& diagnosis, const RepairOptions& options,
            NewClusters& new_clusters, std::unique_ptr<ReferenceMap> visited)
        : metadata_(metadata),
          geometry_(metadata.geometry()),
          rules_(metadata.rules()),
          references_(*diagnosis.references),
          max_refcount_(std::min<std::uint64_t>(format::max_refcount(metadata.header().refcount_order),
                                                References::max_count - 1)),
          zeros_hide_backing_(rules_.version >= 3 || metadata.header().backing_name.empty()),
          memory_bytes_(options.memory_bytes),
          max_copies_(2 * geometry_.clusters(diagnosis.file_bytes) + 1024),
          max_separations_(options.what == RepairOptions::What::all ? geometry_.clusters(diagnosis.file_bytes) : 0),
          new_clusters_(new_clusters),
          visited_(std::move(visited)) {}

    Result<void> reference(const Reference& reference) override {
        switch (reference.kind) {
            case Structure::data: return visit_data(reference);
            case Structure::compressed: return visit_compressed(reference);
            default: break;
        }
        const std::uint64_t first = cluster_of(reference.at);
        TRY_VOID(visited_->add(first, last_cluster(reference) - first + 1, 1, References::metadata));
        switch (reference.kind) {
            case Structure::l2_table: return visit_l2_table(reference);
            case Structure::l1_table:
            case Structure::snapshot_table:
            case Structure::bitmap_directory:
            case Structure::bitmap_table:
            case Structure::bitmap_bits: return visit_table(reference);
            default: return {};
        }
    }

    Result<void> flaw(const Flaw& flaw) override {
        const std::lock_guard lock(mutex_);
        switch (flaw.place.structure) {
            case Structure::header:
                plan_.bad_refcounts |= flaw.target == Structure::refcount_table;
                if (flaw.kind == Flaw::Kind::stale_autoclear) plan_.stale_autoclear |= flaw.word;
                return {};
            case Structure::refcount_table:
            case Structure::refcount_block: plan_.bad_refcounts = true; return {};
            case Structure::snapshot_table: plan_.bad_snapshot_table = true; return {};
            case Structure::bitmap_directory:
                if (flaw.kind == Flaw::Kind::duplicate) {
                    plan_.has_doubled_bitmaps = true;
                } else {
                    plan_.bad_bitmap_directory = true;
                }
                return {};
            case Structure::bitmap:
                if (flaw.kind == Flaw::Kind::refused_bitmap) {
                    plan_.has_refused_bitmaps = true;
                } else {
                    plan_.lost_bitmaps.insert(flaw.place.table);
                }
                return {};
            case Structure::bitmap_table: return correct_bitmap_table(flaw);
            case Structure::l1_table: return flaw.place.index ? correct_l1_entry(flaw) : correct_l1_table(flaw);
            case Structure::l2_table: return correct_l2_entries(flaw);
            default: return {};  // nobody can repair the encryption header
        }
    }

    [[nodiscard]] std::uint64_t next_used(std::uint64_t first, std::uint64_t end) const override {
        return visited_->next_used(first, end);
    }

    RepairPlan take_plan() {
        merge_losses();
        return std::move(plan_);
    }

private:
    [[nodiscard]] std::uint64_t cluster_of(HostOffset at) const { return at.value >> geometry_.cluster_bits; }
    [[nodiscard]] std::uint64_t last_cluster(const Reference& reference) const {
        return (reference.at.value + reference.bytes - 1) >> geometry_.cluster_bits;
    }
    [[nodiscard]] std::uint64_t entry_bytes() const { return std::uint64_t{8} * geometry_.entry_words(); }

    Result<void> add(std::vector<EntryRun>& to, const EntryRun& run) {
        TRY_VOID(take_memory(sizeof(EntryRun)));
        to.push_back(run);
        return {};
    }

    Result<void> take_memory(std::size_t bytes) {
        used_bytes_ += bytes;
        if (used_bytes_ <= memory_bytes_) return {};
        return fail(Errc::limit_exceeded, metadata_.file().name(), "the repair needs more memory than was allowed");
    }

    // Overlaps. Each cluster keeps the use that is the hardest to move. Where a refcount cannot count all references,
    // the first ones stay.

    /// The bits of the uses in front of which this use gives way.
    static std::uint32_t stronger_than(std::uint32_t use) {
        switch (use) {
            case References::l2_table: return References::metadata | References::data | References::compressed;
            case References::data: return References::metadata | References::compressed;
            case References::compressed: return References::metadata;
            default: return 0;
        }
    }

    [[nodiscard]] bool gives_way(References references, std::uint32_t use) const {
        return (references.word & stronger_than(use)) != 0;
    }

    /// Whether this reference to a cluster with one kind of use is one too many. Called once per reference.
    bool exceeds(std::uint64_t most, std::uint64_t cluster, References references, std::uint64_t count) {
        if (references.count() <= most || has_several_uses(references.word & References::uses)) return false;
        auto& counted = counted_[cluster];
        if (counted + count > most) return count <= most;
        counted += count;
        return false;
    }

    /// A copy of `bytes` bytes, with `count` references to it.
    Result<HostOffset> copy(HostOffset from, std::uint64_t bytes, std::uint64_t count, Structure what) {
        if (plan_.copies.size() >= max_copies_) {
            return fail(Errc::limit_exceeded, metadata_.file().name(),
                        fmt::format("the repair would copy more than {} clusters", max_copies_));
        }
        const std::uint64_t clusters = geometry_.clusters(bytes);
        TRY_VOID(take_memory(sizeof(RepairPlan::Copy) + clusters * sizeof(std::uint64_t)));
        const auto to = TRY(new_clusters_.allocate(clusters));
        new_clusters_.refer(to, clusters, count);
        plan_.copies.push_back({from, to, bytes, what});
        return to;
    }

    /// The copy that all references of a use share.
    Result<HostOffset> shared_copy(std::map<std::uint64_t, HostOffset>& copies, std::uint64_t cluster,
                                   std::uint64_t count, Structure what) {
        if (const auto found = copies.find(cluster); found != copies.end()) {
            new_clusters_.refer(found->second, 1, count);
            return found->second;
        }
        const auto to = TRY(copy({cluster << geometry_.cluster_bits}, geometry_.cluster_size(), count, what));
        copies.emplace(cluster, to);
        return to;
    }

    // A snapshot may share clusters with the disk. Two entries of the disk must not share one: the first write to one
    // of them leaves the other with a refcount of 1, but without the COPIED flag.

    /// Whether another reference of the active disk to this cluster was visited before, and there is room for a copy.
    /// Called once per active reference to a cluster with several references.
    Result<bool> needs_separation(std::uint64_t cluster, std::uint32_t use) {
        if ((visited_->at(cluster).word & use) == 0) {
            TRY_VOID(visited_->add(cluster, 1, 1, use));
            return false;
        }
        return plan_.copies.size() < max_separations_ && new_clusters_.has_spare_room();
    }

    Result<void> visit_l2_table(const Reference& reference) {
        const std::uint64_t cluster = cluster_of(reference.at);
        const auto references = references_.at(cluster);
        std::optional<HostOffset> to;
        if (gives_way(references, References::l2_table)) {
            to = TRY(shared_copy(l2_copies_, cluster, reference.count, reference.kind));
            moving_tables_.insert(reference.at);
        } else if (exceeds(rules_.external_data ? 1 : max_refcount_, cluster, references, reference.count)) {
            to = TRY(copy(reference.at, geometry_.cluster_size(), reference.count, reference.kind));
            // In an external data file, the place of an L1 entry says where all data of its table lie.
            if (rules_.external_data) moving_tables_.insert(reference.at);
        } else if (reference.active && references.count() > 1 && TRY(needs_separation(cluster, References::copied))) {
            to = TRY(copy(reference.at, geometry_.cluster_size(), reference.count, reference.kind));
        }
        if (to) return add(plan_.pointers, {.at = reference.place.at, .word = to->value});
        const bool own = references.count() == 1;
        if (!reference.active || reference.copied == own) return {};
        return add(plan_.marks,
                   {.at = reference.place.at, .word = reference.at.value | (own ? format::copied_bit : 0)});
    }

    /// Tables and bits of which one reference leads to one structure.
    Result<void> visit_table(const Reference& reference) {
        for (std::uint64_t cluster = cluster_of(reference.at); cluster <= last_cluster(reference); ++cluster) {
            const auto references = references_.at(cluster);
            if (has_several_uses(references.word & References::uses)) moving_tables_.insert(reference.at);
            if ((references.word & References::uses) != References::metadata || references.count() < 2) continue;
            if (reference.kind == Structure::bitmap_bits) {
                const auto to = TRY(copy(reference.at, reference.bytes, 1, reference.kind));
                return add(plan_.pointers, {.at = reference.place.at, .word = to.value});
            }
            note_shared(reference.kind, reference.at, reference.bytes, reference.place);
            return {};
        }
        return {};
    }

    void note_shared(Structure kind, HostOffset at, std::uint64_t bytes, const Place& place) {
        const bool of_snapshot = kind == Structure::l1_table && place.name.has_value();
        const auto known = std::ranges::find_if(
            plan_.shared_tables, [&](const auto& table) { return table.kind == kind && table.at == at; });
        if (known == plan_.shared_tables.end()) plan_.shared_tables.push_back({kind, at, bytes, of_snapshot});
        moving_tables_.insert(at);
    }

    /// The words that differ from those of the entry, from one cluster to the next.
    Result<void> visit_data(const Reference& reference) {
        const std::uint64_t first = cluster_of(reference.at);
        const std::uint64_t count = reference.bytes >> geometry_.cluster_bits;
        const std::uint64_t flags = geometry_.extended_l2 ? 0 : format::zero_bit;
        const std::uint64_t word = reference.word & (format::offset_mask | flags);
        EntryRun marks{.entry_bytes = entry_bytes(), .count = 0, .step = geometry_.cluster_size()};
        const auto end_marks = [&]() -> Result<void> {
            if (marks.count == 0) return {};
            const std::lock_guard lock(mutex_);
            TRY_VOID(add(plan_.marks, marks));
            marks.count = 0;
            return {};
        };
        for (std::uint64_t i = 0; i < count;) {
            const auto chunk = references_.chunk_from(first + i);
            const std::uint64_t piece = std::min<std::uint64_t>(count - i, chunk.size());
            if (piece == 0) break;
            for (std::uint64_t k = 0; k < piece; ++k, ++i) {
                const HostOffset at = reference.place.at + i * entry_bytes();
                const std::uint64_t own_word = word + i * geometry_.cluster_size();
                const bool shared = reference.active && chunk[k].count() > 1;
                if ((shared || may_have_to_move(chunk[k])) &&
                    TRY(move_data(reference, first + i, chunk[k], at, own_word & flags))) {
                    TRY_VOID(end_marks());
                    continue;
                }
                const bool own = chunk[k].count() == 1;
                if (!reference.active || reference.copied == own) {
                    TRY_VOID(end_marks());
                    continue;
                }
                if (marks.count++ == 0) {
                    marks.at = at;
                    marks.word = own_word | (own ? format::copied_bit : 0);
                }
            }
        }
        return end_marks();
    }

    [[nodiscard]] bool may_have_to_move(References references) const {
        return has_several_uses(references.word & References::uses) || references.count() > max_refcount_;
    }

    /// Whether the entry at `at` gets a copy of its cluster.
    Result<bool> move_data(const Reference& reference, std::uint64_t cluster, References references, HostOffset at,
                           std::uint64_t flags) {
        const std::lock_guard lock(mutex_);
        const bool overlaps = gives_way(references, References::data);
        const bool separates =
            reference.active && references.count() > 1 && TRY(needs_separation(cluster, References::data));
        if (!overlaps && !separates && !exceeds(max_refcount_, cluster, references, reference.count)) return false;
        if (moving_tables_.contains(reference.place.table)) return true;  // first its table gets a place of its own
        EntryRun pointer{.at = at, .entry_bytes = entry_bytes(), .word = flags};
        if (flags != 0) {
            TRY_VOID(add(plan_.corrections, pointer));  // zeros need no cluster
            return true;
        }
        const auto to = overlaps ? TRY(shared_copy(data_copies_, cluster, reference.count, reference.kind))
                                 : TRY(copy({cluster << geometry_.cluster_bits}, geometry_.cluster_size(),
                                            reference.count, reference.kind));
        pointer.word = to.value;
        TRY_VOID(add(plan_.pointers, pointer));
        return true;
    }

    Result<void> visit_compressed(const Reference& reference) {
        bool moves = false;
        for (std::uint64_t cluster = cluster_of(reference.at); cluster <= last_cluster(reference); ++cluster) {
            const auto references = references_.at(cluster);
            if (!may_have_to_move(references)) continue;
            const std::lock_guard lock(mutex_);
            moves |= gives_way(references, References::compressed) ||
                     exceeds(max_refcount_, cluster, references, reference.count);
        }
        if (!moves) return {};
        const std::lock_guard lock(mutex_);
        if (moving_tables_.contains(reference.place.table)) return {};
        const auto to = TRY(copy(reference.at, reference.bytes, reference.count, reference.kind));
        if (!lies_within(to.value, reference.bytes, bit(format::compressed_offset_bits(geometry_.cluster_bits)))) {
            return fail(Errc::limit_exceeded, metadata_.file().name(),
                        "the file is too long for another compressed cluster at its end");
        }
        return add(plan_.pointers, {.at = reference.place.at,
                                    .entry_bytes = entry_bytes(),
                                    .word = format::compressed_word({to, reference.bytes}, geometry_.cluster_bits)});
    }

    // Flaws.

    Result<void> correct_bitmap_table(const Flaw& flaw) {
        const auto& place = flaw.place;
        if (!place.index) {
            if (flaw.kind == Flaw::Kind::overlap) {
                note_shared(Structure::bitmap_table, flaw.at, flaw.bytes, place);
            } else {
                plan_.lost_bitmaps.insert(place.table);
            }
            return {};
        }
        if (moving_tables_.contains(place.table)) return {};
        if (flaw.kind == Flaw::Kind::reserved_bits) {
            const auto cluster = format::BitmapTableEntry{flaw.word}.cluster().value;
            return add(plan_.bitmap_corrections, {.at = place.at, .word = cluster != 0 ? cluster : flaw.word & 1});
        }
        plan_.stale_bitmaps.insert(place.table);
        return add(plan_.bitmap_corrections, {.at = place.at});
    }

    Result<void> correct_l1_table(const Flaw& flaw) {
        const bool of_snapshot = flaw.place.name.has_value();
        if (flaw.kind == Flaw::Kind::overlap || (!of_snapshot && flaw.kind == Flaw::Kind::past_end)) {
            note_shared(Structure::l1_table, flaw.at, flaw.bytes, flaw.place);
        } else if (of_snapshot) {
            plan_.bad_snapshots.insert(flaw.place.table);
        }
        return {};
    }

    Result<void> correct_l1_entry(const Flaw& flaw) {
        if (moving_tables_.contains(flaw.place.table)) return {};
        if (flaw.kind == Flaw::Kind::reserved_bits) {
            return add(plan_.corrections,
                       {.at = flaw.place.at, .word = flaw.word & (format::offset_mask | format::copied_bit)});
        }
        if (flaw.kind != Flaw::Kind::copied_flag)
            lose(flaw, {*flaw.place.index * geometry_.l2_coverage()}, geometry_.l2_coverage(), false);
        return add(plan_.corrections, {.at = flaw.place.at});
    }

    Result<void> correct_l2_entries(const Flaw& flaw) {
        if (moving_tables_.contains(flaw.place.table)) return {};
        const std::uint64_t cluster_size = geometry_.cluster_size();
        const L2Entry entry{flaw.word};
        EntryRun run{.at = flaw.place.at, .entry_bytes = entry_bytes(), .count = flaw.count};
        if (flaw.target == Structure::compressed) return correct_compressed(flaw, run);
        const std::uint64_t offset = entry.cluster().value;
        const std::uint64_t step = rules_.has_cluster(entry) ? cluster_size : 0;
        switch (flaw.kind) {
            case Flaw::Kind::past_end: {
                if (flaw.in_data_file) return {};  // the data file was cut
                const std::uint64_t before = (flaw.at.value - offset) / cluster_size;
                run.at += before * entry_bytes();
                return drop(flaw, run, before, rules_.run(entry, 0).kind != format::ClusterKind::zero_allocated);
            }
            case Flaw::Kind::misplaced:
                run.word = flaw.place.guest->value | format::copied_bit | (flaw.word & zero_flag());
                run.step = cluster_size;
                return add(plan_.corrections, run);
            case Flaw::Kind::copied_flag:
                // In an external data file every cluster is the image's own; otherwise there is no cluster.
                run.word = step != 0 ? flaw.word | format::copied_bit : flaw.word & ~format::copied_bit;
                run.step = step;
                return add(plan_.corrections, run);
            case Flaw::Kind::reserved_bits:
                run.word = flaw.word & (format::offset_mask | format::copied_bit | zero_flag());
                run.step = step;
                return add(plan_.corrections, run);
            case Flaw::Kind::contradiction: return correct_contradiction(flaw, run, step);
            default: return drop(flaw, run, 0, true);
        }
    }

    [[nodiscard]] std::uint64_t zero_flag() const {
        return geometry_.extended_l2 || rules_.version < 3 ? 0 : format::zero_bit;
    }

    Result<void> correct_compressed(const Flaw& flaw, EntryRun run) {
        if (flaw.hides_references || rules_.external_data) return drop(flaw, run, 0, true);
        if (flaw.kind == Flaw::Kind::past_end) {
            // The stream ends where the file's last cluster does.
            const std::uint64_t end = geometry_.clusters(flaw.limit) << geometry_.cluster_bits;
            run.word = format::compressed_word({flaw.at, end - flaw.at.value}, geometry_.cluster_bits);
            return add(plan_.corrections, run);
        }
        run.word = flaw.word & ~format::copied_bit;
        if (geometry_.extended_l2) run.bitmap = 0;
        return add(plan_.corrections, run);
    }

    /// An entry whose bits contradict each other, but whose cluster can be told.
    Result<void> correct_contradiction(const Flaw& flaw, EntryRun run, std::uint64_t step) {
        run.step = step;
        if (!geometry_.extended_l2) {
            run.word = flaw.word & ~format::zero_bit;  // version 2 does not have it
            return add(plan_.revealing_corrections, run);
        }
        if (step == 0) return drop(flaw, run, 0, true);  // nobody knows where the allocated subclusters are
        const auto bitmap = TRY(subclusters_at(flaw.place.at));
        run.word = flaw.word & (format::offset_mask | format::copied_bit);
        run.bitmap = bitmap & ~((bitmap & allocated_subclusters) << 32);  // what the cluster holds counts
        return add(plan_.revealing_corrections, run);
    }

    /// The bitmap of the extended L2 entry at `at`.
    Result<std::uint64_t> subclusters_at(HostOffset at) const {
        std::array<std::byte, 8> bytes = {};
        TRY(metadata_.file().read(at + 8, bytes));
        return load_be<std::uint64_t>(bytes, 0);
    }

    /// The entries become zeros, or holes where the format has no zeros. `before`: entries of the flaw's run that stay.
    Result<void> drop(const Flaw& flaw, EntryRun run, std::uint64_t before, bool loses) {
        const GuestOffset guest = *flaw.place.guest + before * geometry_.cluster_size();
        if (geometry_.extended_l2 && flaw.target != Structure::compressed) return drop_subclusters(flaw, run, guest);
        if (geometry_.extended_l2) {
            run.bitmap = all_zero_subclusters;
        } else {
            run.word = zero_flag();
        }
        if (loses) lose(flaw, guest, flaw.count * geometry_.cluster_size(), zeros_hide_backing_);
        return add(plan_.corrections, run);
    }

    /// The subclusters that the lost clusters held become zeros. The others stay what they are. `guest`: of the first
    /// entry of `run`; all of them have the same bitmap.
    Result<void> drop_subclusters(const Flaw& flaw, EntryRun run, GuestOffset guest) {
        const auto bitmap = TRY(subclusters_at(run.at));
        const std::uint64_t allocated = bitmap & allocated_subclusters;
        run.bitmap = (bitmap & ~allocated_subclusters) | allocated << 32;
        TRY_VOID(add(plan_.corrections, run));
        if (allocated == allocated_subclusters) {
            lose(flaw, guest, run.count * geometry_.cluster_size(), true);
            return {};
        }
        for (std::uint64_t i = 0; i < run.count && allocated != 0; ++i, guest += geometry_.cluster_size()) {
            for (unsigned first = 0; first < 32;) {
                first += static_cast<unsigned>(std::countr_zero(allocated >> first));
                if (first >= 32) break;
                const auto count = static_cast<unsigned>(std::countr_one(allocated >> first));
                const unsigned bits = geometry_.subcluster_bits();
                lose(flaw, guest + (std::uint64_t{first} << bits), std::uint64_t{count} << bits, true);
                first += count;
            }
        }
        return {};
    }

    void lose(const Flaw& flaw, GuestOffset guest, std::uint64_t length, bool reads_as_zeros) {
        const bool in_snapshots = flaw.place.name.has_value() || !flaw.place.active;
        const std::uint64_t size = metadata_.state().size;
        // What lies behind the end of the disk is the state of a machine in a snapshot, or nothing at all.
        if (!in_snapshots && guest.value >= size) return;
        if (!in_snapshots) length = std::min(length, size - guest.value);
        if (plan_.losses.size() >= max_raw_losses) {
            ++plan_.unlisted_losses;
            return;
        }
        const auto finding = finding_of(flaw, geometry_.cluster_bits);
        plan_.losses.push_back({.guest = guest,
                                .length = length,
                                .in_snapshots = in_snapshots,
                                .reads_as_zeros = reads_as_zeros || metadata_.header().backing_name.empty(),
                                .why = finding.place + ": " + finding.what});
    }

    /// Sorts the losses, and makes one of those that lie one behind the other.
    void merge_losses() {
        std::ranges::sort(plan_.losses, {}, [](const RepairLoss& loss) {
            return std::tuple(loss.in_snapshots, loss.guest, loss.length, loss.why);
        });
        std::vector<RepairLoss> merged;
        for (auto& loss : plan_.losses) {
            auto* last = merged.empty() ? nullptr : &merged.back();
            if (last != nullptr && last->in_snapshots == loss.in_snapshots &&
                last->reads_as_zeros == loss.reads_as_zeros && last->guest + last->length == loss.guest) {
                last->length += loss.length;
            } else {
                merged.push_back(std::move(loss));
            }
        }
        plan_.losses = std::move(merged);
    }

    const Metadata& metadata_;
    const format::Geometry& geometry_;
    const format::EntryRules& rules_;
    const ReferenceMap& references_;
    const std::uint64_t max_refcount_;
    const bool zeros_hide_backing_;
    const std::size_t memory_bytes_;
    const std::uint64_t max_copies_;
    const std::uint64_t max_separations_;  // copies that are made although the image would be sound without them
    NewClusters& new_clusters_;
    std::unique_ptr<ReferenceMap> visited_;  // so far, without guest data

    std::mutex mutex_;
    RepairPlan plan_;
    std::size_t used_bytes_ = 0;
    std::map<std::uint64_t, HostOffset> l2_copies_;    // by cluster
    std::map<std::uint64_t, HostOffset> data_copies_;  // by cluster
    std::map<std::uint64_t, std::uint64_t> counted_;   // references that stay, by cluster
    std::set<HostOffset> moving_tables_;  // whose entries are not corrected: something else lies in the same cluster
};

}  // namespace

Result<RepairPlan> plan_repair(const Metadata& metadata, const Storage* data_file, const Diagnosis& diagnosis,
                               const RepairOptions& options, bool refcounts, NewClusters& new_clusters) {
    auto visited = TRY(ReferenceMap::create(diagnosis.references->clusters(), options.memory_bytes));
    Planner planner(metadata, diagnosis, options, new_clusters, std::move(visited));
    WalkOptions walk_options;
    walk_options.refcounts = refcounts;
    walk_options.data_file = data_file;
    walk_options.workers = options.workers;
    walk_options.memory_bytes = options.memory_bytes;
    walk_options.control = options.control;
    TRY(walk(metadata, diagnosis.file_bytes, walk_options, planner));
    return planner.take_plan();
}

}  // namespace qcow::qcow2
