#include "qcow2/repair.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include "base/endian.h"
#include "base/going_on.h"
#include "disk/encrypted.h"
#include "format/refcount.h"
#include "qcow2/image_check.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/repair_directories.h"
#include "qcow2/repair_plan.h"
#include "qcow2/repair_refcounts.h"
#include "storage/planned_file.h"

namespace qcow::qcow2 {
namespace {

/// What one round repairs, the next one sees. Damage that hides other damage needs several.
constexpr unsigned max_rounds = 64;
constexpr std::size_t repair_cache_bytes = 1 * MiB;

/// Repairs the image in rounds: a check, a plan, and changes, which go to a PlannedFile. Each round leaves the image no
/// worse at any instant:
/// 1. Entries are corrected, or cleared. They lead nowhere new.
/// 2. Copies and new tables go to clusters that nothing refers to, and refcounts that are too low are raised.
/// 3. Entries and the header lead to the copies and the new tables.
/// 4. Only then are refcounts lowered.
class Repair {
public:
    Repair(std::shared_ptr<PlannedFile> file, const Storage* data_file, const RepairOptions& options,
           const FindCipher& find_cipher, bool fixed_size)
        : file_(std::move(file)),
          data_file_(data_file),
          options_(options),
          find_cipher_(find_cipher),
          fixed_size_(fixed_size) {
        check_.workers = options.workers;
        check_.max_findings = options.max_findings;
        check_.memory_bytes = options.memory_bytes;
        check_.control = options.control;
    }

    Result<RepairResult> run() {
        const auto header = TRY(read_parsable_header(*file_));
        if (header.corrected && options_.what == RepairOptions::What::all) TRY_VOID(write_header({header.cluster}));
        for (unsigned round = 0;; ++round) {
            TRY_VOID(open());
            const auto diagnosis = TRY(diagnose(*image_, data_file_, check_, !new_refcounts_));
            if (round == 0) {
                result_.before = diagnosis.report;
                if (header.corrected) ++result_.before.corruptions;
            }
            if (round == 0 && TRY(complete_last_table(diagnosis))) continue;
            if (round < max_rounds && TRY(improve(*image_, diagnosis))) continue;
            TRY_VOID(finish(*image_, diagnosis));
            return std::move(result_);
        }
    }

private:
    Result<void> open() {
        image_ =
            std::make_unique<Metadata>(
                TRY(format::parse_header(TRY(read_first_cluster(*file_)))), file_, repair_cache_bytes);
        return {};
    }

    /// Makes the file as long as its last table, which was cut. The missing entries become zeros.
    Result<bool> complete_last_table(const Diagnosis& diagnosis) {
        const std::uint64_t missing = diagnosis.report.missing_bytes;
        if (missing == 0 || options_.what != RepairOptions::What::all || fixed_size_) return false;
        if (const auto& cut = diagnosis.cut_table; cut && cut->length > 0) {
            lose({.guest = cut->guest,
                  .length = cut->length,
                  .in_snapshots = cut->in_snapshots,
                  .reads_as_zeros = image_->header().backing_name.empty(),
                  .why = cut->finding.place + ": " + cut->finding.what});
        }
        TRY_VOID(file_->resize(TRY(file_->size()) + missing));
        return true;
    }

    /// Returns whether this round changed something.
    Result<bool> improve(const Metadata& image, const Diagnosis& diagnosis) {
        NewClusters added(image, diagnosis, TRY(room(image)));
        const CountedClusters counted{image, diagnosis, added};
        if (options_.what == RepairOptions::What::leaks) return give_back_leaks(counted, added);
        const auto& report = diagnosis.report;
        const bool refused = TRY(has_refused_snapshots(image));
        if (report.clean() && !new_refcounts_ && !refused) {
            // Refcounts past the end of the file would become leaks as it grows.
            if (report.counted_past_end > 0 && TRY(lower(counted))) return true;
            return remove_bitmaps(counted, added);
        }

        // A cluster whose refcount becomes 1 gets the COPIED flag.
        const bool only_leaks =
            report.corruptions + report.errors + report.postponed == 0 && !new_refcounts_ && !refused;
        if (only_leaks && TRY(lower_refcounts(counted, nullptr)).to_use == 0) return lower(counted);

        auto plan = TRY(plan_repair(image, data_file_, diagnosis, options_, !new_refcounts_, added));
        plan.bad_snapshot_table |= refused;
        if (!new_refcounts_ && (plan.bad_refcounts || refcounts_overlap(image, diagnosis))) {
            new_refcounts_ = true;
            return true;
        }
        if (report.corruptions > 0) TRY_VOID(mark_corrupt(image));
        if (plan.corrects_structures()) return correct_structures(image, diagnosis, plan);
        if (plan.corrects_entries()) return correct_entries(plan);
        if (plan.moves()) return move(counted, added, plan);
        return correct_refcounts(counted, added, plan);
    }

    Result<Room> room(const Metadata& image) const {
        Room room{.inside = fixed_size_ || result_.losses.empty(), .fixed_size = fixed_size_};
        if (!new_refcounts_) return room;
        // The header still leads to these, whatever they are worth.
        const auto state = image.state();
        const auto& geometry = image.geometry();
        std::vector<std::byte> table(std::min(std::uint64_t{state.refcount_table_clusters} * geometry.cluster_size(),
                                              format::max_refcount_table_bytes));
        TRY(image.file().read(state.refcount_table, table));
        for (std::uint64_t i = 0; i < geometry.clusters(table.size()); ++i)
            room.taken.insert((state.refcount_table.value >> geometry.cluster_bits) + i);
        for (std::size_t at = 0; at < table.size(); at += 8) {
            const format::RefcountTableEntry entry{load_be<std::uint64_t>(table, at)};
            if (entry.allocated()) room.taken.insert(entry.block().value >> geometry.cluster_bits);
        }
        return room;
    }

    /// Whether something else lies in a refcount block, or two blocks in one cluster.
    static bool refcounts_overlap(const Metadata& image, const Diagnosis& diagnosis) {
        return std::ranges::any_of(diagnosis.blocks, [&](HostOffset block) {
            return block.value != 0 &&
                   diagnosis.references->at(block.value >> image.geometry().cluster_bits).count() != 1;
        });
    }

    Result<bool> give_back_leaks(const CountedClusters& counted, NewClusters& added) {
        const auto& [image, diagnosis, unused] = counted;
        if (diagnosis.uncounted || refcounts_overlap(image, diagnosis)) return false;
        // Damaged entries keep their flags, so they have to keep their refcounts, too.
        if (diagnosis.report.corruptions > 0) return lower(counted, Lower::to_zero);
        if (TRY(lower_refcounts(counted, nullptr)).to_use > 0) {
            auto plan = TRY(plan_repair(image, data_file_, diagnosis, options_, true, added));
            std::erase_if(plan.marks, [](const EntryRun& run) { return (run.word & format::copied_bit) == 0; });
            TRY_VOID(write_entries(plan.marks));
        }
        return lower(counted);
    }

    // The kinds of rounds.

    Result<bool> correct_entries(const RepairPlan& plan) {
        if (!plan.revealing_corrections.empty()) {
            TRY_VOID(write_entries(plan.revealing_corrections));
            return true;
        }
        TRY_VOID(write_entries(plan.corrections));
        for (const auto& loss : plan.losses) lose(loss);
        result_.unlisted_losses += plan.unlisted_losses;
        return true;
    }

    Result<bool> correct_structures(const Metadata& image, const Diagnosis& diagnosis, const RepairPlan& plan) {
        TRY_VOID(write_entries(plan.bitmap_corrections));
        NewClusters added(image, diagnosis, TRY(room(image)));
        auto header = TRY(repair_directories(image, plan, added, *file_));
        for (const auto& loss : header.losses) lose(loss);
        const CountedClusters counted{image, diagnosis, added};
        if (!new_refcounts_ && counted.are_covered()) TRY(raise_refcounts(counted, *file_));
        TRY_VOID(file_->flush());
        TRY_VOID(write_header(header.steps));
        return true;
    }

    Result<bool> move(const CountedClusters& counted, NewClusters& added, const RepairPlan& plan) {
        for (const auto& copy : plan.copies) {
            result_.copied_clusters += counted.metadata.geometry().clusters(copy.bytes);
            if (copy.what == Structure::data) {
                TRY_VOID(file_->copy(copy.from, copy.to, copy.bytes, TRY(copying_of_data(counted.metadata))));
            } else if (copy.what == Structure::compressed) {
                TRY_VOID(file_->copy(copy.from, copy.to, copy.bytes));
            } else {
                std::vector<std::byte> bytes(copy.bytes);
                TRY(file_->read(copy.from, bytes));
                TRY_VOID(file_->write(copy.to, bytes));
            }
        }
        TRY_VOID(count_new(counted, added));
        TRY_VOID(write_entries(plan.pointers));
        return true;
    }

    /// LUKS encrypts data for their place in the file.
    Result<CopyBytes> copying_of_data(const Metadata& image) {
        if (options_.dry_run || image.header().crypt != format::Crypt::luks) return copy_unchanged;
        if (!find_cipher_) {
            return fail(Errc::encrypted, file_->name(),
                        "it is encrypted, and data that get a place of their own are encrypted again, with its key");
        }
        if (!encryption_) encryption_ = std::make_shared<EncryptedBytes>(TRY(find_cipher_(*file_)));
        return [encryption = encryption_](Storage& file, HostOffset from, HostOffset to, std::uint64_t bytes) {
            return encryption->copy(file, from, to, bytes);
        };
    }

    Result<bool> correct_refcounts(const CountedClusters& counted, NewClusters& added, const RepairPlan& plan) {
        if (new_refcounts_ || !counted.are_covered()) {
            TRY_VOID(count_new(counted, added));
            return true;
        }
        bool changed = TRY(raise_refcounts(counted, *file_));
        TRY_VOID(file_->flush());
        TRY_VOID(write_entries(plan.marks));
        changed |= !plan.marks.empty();
        // What cannot be counted may be what a refcount is about.
        if (!counted.diagnosis.uncounted && TRY(lower(counted))) changed = true;
        return changed;
    }

    Result<bool> lower(const CountedClusters& counted, Lower which = Lower::all) {
        auto lowered = TRY(lower_refcounts(counted, file_.get(), which));
        std::ranges::move(lowered.freed, std::back_inserter(freed_));
        TRY_VOID(file_->flush());
        return lowered.to_zero + lowered.to_use > 0;
    }

    Result<bool> remove_bitmaps(const CountedClusters& counted, NewClusters& added) {
        if (!options_.remove_inconsistent_bitmaps) return false;
        const auto removed = TRY(remove_inconsistent_bitmaps(counted.metadata, added, *file_));
        if (removed.names.empty()) return false;
        std::ranges::copy(removed.names, std::back_inserter(result_.removed_bitmaps));
        if (counted.are_covered()) TRY(raise_refcounts(counted, *file_));
        TRY_VOID(file_->flush());
        TRY_VOID(write_header(removed.steps));
        return true;
    }

    /// Nothing more is to be repaired, or can be.
    Result<void> finish(const Metadata& image, const Diagnosis& diagnosis) {
        result_.after = diagnosis.report;
        auto& after = result_.after;
        auto state = image.state();
        constexpr auto bits = format::incompatible::dirty | format::incompatible::corrupt;
        if (after.corruptions + after.errors + after.postponed == 0 && state.has(bits)) {
            state.incompatible &= ~bits;
            TRY_VOID(write_header(TRY(header_steps(*file_, state))));
            after.dirty = false;
            after.marked_corrupt = false;
        }
        const auto fixed = [](std::uint64_t before, std::uint64_t now) { return before - std::min(before, now); };
        const auto& before = result_.before;
        result_.leaks_fixed = fixed(before.leaks, after.leaks);
        result_.corruptions_fixed = fixed(before.corruptions + before.errors, after.corruptions + after.errors);
        result_.postponed_fixed = fixed(before.postponed, after.postponed);
        if (result_.losses.empty()) TRY_VOID(free_space(diagnosis, image.geometry().cluster_bits));
        result_.changed = !file_->unchanged();
        return {};
    }

    /// Gives the space of free clusters back to the file system. (Where something was lost, it stays for those who want
    /// to look for it.)
    Result<void> free_space(const Diagnosis& diagnosis, unsigned cluster_bits) {
        const std::uint64_t size = TRY(file_->size());
        const std::uint64_t image_end = diagnosis.report.image_end;
        for (const auto& [at, bytes] : freed_) {
            // A later round may have used a cluster that an earlier one had freed.
            const std::uint64_t cluster_size = bit(cluster_bits);
            for (HostOffset cluster = at; cluster < at + bytes && cluster.value < image_end; cluster += cluster_size) {
                if (diagnosis.references->at(cluster.value >> cluster_bits).word == 0)
                    file_->punch(cluster, cluster_size);
            }
        }
        const bool ends_free = std::ranges::any_of(
            freed_, [&](const auto& run) { return run.first.value < size && run.first.value + run.second >= size; });
        return ends_free && image_end < size ? file_->resize(image_end) : Result<void>();
    }

    void lose(const RepairLoss& loss) {
        if (result_.losses.size() < options_.max_findings) {
            result_.losses.push_back(loss);
        } else {
            ++result_.unlisted_losses;
        }
    }

    // Steps, each durable before the next.

    Result<void> write_header(const std::vector<std::vector<std::byte>>& steps) {
        return qcow2::write_header(*file_, steps);
    }

    Result<void> write_entries(const std::vector<EntryRun>& runs) {
        for (const auto& run : runs) {
            for (std::uint64_t i = 0; i < run.count; ++i) {
                std::array<std::byte, 16> bytes = {};
                store_be(bytes, 0, run.word + i * run.step);
                store_be(bytes, 8, run.bitmap.value_or(0));
                TRY_VOID(file_->write(run.at + i * run.entry_bytes, std::span(bytes).first(run.bitmap ? 16 : 8)));
            }
        }
        return file_->flush();
    }

    /// While a repair is incomplete, nobody else writes to the image.
    Result<void> mark_corrupt(const Metadata& image) {
        auto state = image.state();
        if (image.header().version < 3 || state.has(format::incompatible::corrupt)) return {};
        state.incompatible |= format::incompatible::corrupt;
        return write_header(TRY(header_steps(*file_, state)));
    }

    /// Counts the new clusters: in the refcounts that there are, or in new ones.
    Result<void> count_new(const CountedClusters& counted, NewClusters& added) {
        if (!new_refcounts_ && counted.are_covered()) {
            TRY(raise_refcounts(counted, *file_));
            return file_->flush();
        }
        const auto fresh = TRY(write_new_refcounts(counted.metadata, counted.diagnosis, added, *file_));
        TRY_VOID(file_->flush());
        format::HeaderState state = TRY(format::parse_header(TRY(read_first_cluster(*file_))));
        state.refcount_table = fresh.table;
        state.refcount_table_clusters = fresh.table_clusters;
        TRY_VOID(write_header(TRY(header_steps(*file_, state))));
        new_refcounts_ = false;
        result_.refcounts_rebuilt = true;
        return {};
    }

    const std::shared_ptr<PlannedFile> file_;
    std::unique_ptr<Metadata> image_;  // as the file has it at the beginning of a round
    const Storage* const data_file_;
    const RepairOptions& options_;
    const FindCipher& find_cipher_;
    std::shared_ptr<EncryptedBytes> encryption_;  // null: no such data have moved yet
    const bool fixed_size_;
    CheckOptions check_;
    /// The image's refcount table or its blocks cannot be used. New ones count everything but these.
    bool new_refcounts_ = false;
    std::vector<std::pair<HostOffset, std::uint64_t>> freed_;
    RepairResult result_;
};

/// Takes back the mark of a repair that failed. Refcounts and entries are at least as good as before.
Result<void> clear_corrupt_mark(Storage& file) {
    format::HeaderState state = TRY(format::parse_header(TRY(read_first_cluster(file))));
    if (!state.has(format::incompatible::corrupt)) return {};
    state.incompatible &= ~format::incompatible::corrupt;
    for (const auto& step : TRY(header_steps(file, state))) {
        TRY_VOID(file.write({0}, step));
        TRY_VOID(file.flush());
    }
    return {};
}

}  // namespace

Result<RepairResult> repair_image(const std::shared_ptr<Storage>& file, const Storage* data_file,
                                  const RepairOptions& options, const FindCipher& find_cipher, bool fixed_size) {
    auto planned = TRY(PlannedFile::create(file, options.memory_bytes));
    auto result = TRY(Repair(planned, data_file, options, find_cipher, fixed_size).run());
    if (options.on_loss) {
        for (const auto& loss : result.losses) options.on_loss(loss);
    }
    TRY_VOID(verify_goes_on(options.control));
    if (options.dry_run) return result;
    if (auto done = planned->carry_out(options.control); !done) {
        if (!result.before.marked_corrupt) (void)clear_corrupt_mark(*file);
        return std::unexpected(std::move(done).error());
    }
    return result;
}

}  // namespace qcow::qcow2
