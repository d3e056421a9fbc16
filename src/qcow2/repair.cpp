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
constexpr std::size_t cache_bytes = 1 * MiB;

/// Repairs the image in rounds: a check, a plan, and changes, which go to a PlannedFile. Each round leaves the image no
/// worse at any instant:
/// 1. Entries are corrected, or cleared. They lead nowhere new.
/// 2. Copies and new tables come behind everything else, and refcounts that are too low are raised.
/// 3. Entries and the header lead to the copies and the new tables.
/// 4. Only then are refcounts lowered.
class Repair {
public:
    Repair(std::shared_ptr<PlannedFile> file, const Storage* data_file, const RepairOptions& options)
        : file_(std::move(file)), data_file_(data_file), options_(options) {
        check_.workers = options.workers;
        check_.max_findings = options.max_findings;
        check_.memory_bytes = options.memory_bytes;
        check_.control = options.control;
    }

    Result<RepairResult> run() {
        const auto header = TRY(read_parsable_header(*file_));
        if (header.corrected && options_.what == RepairOptions::What::all) TRY_VOID(write_header({header.cluster}));
        for (unsigned round = 0;; ++round) {
            const auto image = TRY(open());
            const auto diagnosis = TRY(diagnose(*image, data_file_, check_, !new_refcounts_));
            if (round == 0) {
                result_.before = diagnosis.report;
                if (header.corrected) ++result_.before.corruptions;
            }
            if (round < max_rounds && TRY(improve(*image, diagnosis))) continue;
            TRY_VOID(finish(*image, diagnosis));
            return std::move(result_);
        }
    }

private:
    [[nodiscard]] Result<std::unique_ptr<Metadata>> open() const {
        return std::make_unique<Metadata>(
            TRY(format::parse_header(TRY(read_first_cluster(*file_)))), file_, cache_bytes);
    }

    /// Returns whether this round changed something.
    Result<bool> improve(const Metadata& image, const Diagnosis& diagnosis) {
        NewClusters added(diagnosis, image.geometry().cluster_bits);
        const CountedClusters counted{image, diagnosis, added};
        if (options_.what == RepairOptions::What::leaks) return give_back_leaks(counted, added);
        const auto& report = diagnosis.report;
        const bool refused = TRY(has_refused_snapshots(image));
        if (report.clean() && !new_refcounts_ && !refused) return remove_bitmaps(counted, added);

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
        NewClusters added(diagnosis, image.geometry().cluster_bits);
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
            if (!copy.metadata) {
                TRY_VOID(file_->copy(copy.from, copy.to, copy.bytes));
                continue;
            }
            std::vector<std::byte> bytes(copy.bytes);
            TRY(file_->read(copy.from, bytes));
            TRY_VOID(file_->write(copy.to, bytes));
        }
        TRY_VOID(count_new(counted, added));
        TRY_VOID(write_entries(plan.pointers));
        return true;
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
        if (removed.count == 0) return false;
        result_.removed_bitmaps += removed.count;
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
        const auto sum = [](const CheckReport& report) {
            return report.corruptions + report.errors + report.postponed;
        };
        result_.leaks_fixed = result_.before.leaks - std::min(result_.before.leaks, after.leaks);
        result_.corruptions_fixed = sum(result_.before) - std::min(sum(result_.before), sum(after));
        if (result_.losses.empty()) TRY_VOID(free_space(after.image_end));
        result_.changed = !file_->unchanged();
        return {};
    }

    /// Gives the space of free clusters back to the file system. (Where something was lost, it stays for those who want
    /// to look for it.)
    Result<void> free_space(std::uint64_t image_end) {
        const std::uint64_t size = TRY(file_->size());
        for (const auto& [at, bytes] : freed_) {
            if (at.value < image_end) file_->punch(at, bytes);
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
        for (const auto& step : steps) {
            TRY_VOID(file_->write({0}, step));
            TRY_VOID(file_->flush());
        }
        return {};
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
        const auto image = TRY(open());
        auto state = image->state();
        state.refcount_table = fresh.table;
        state.refcount_table_clusters = fresh.table_clusters;
        TRY_VOID(write_header(TRY(header_steps(*file_, state))));
        new_refcounts_ = false;
        result_.refcounts_rebuilt = true;
        return {};
    }

    const std::shared_ptr<PlannedFile> file_;
    const Storage* const data_file_;
    const RepairOptions& options_;
    CheckOptions check_;
    /// The image's refcount table or its blocks cannot be used. New ones count everything but these.
    bool new_refcounts_ = false;
    std::vector<std::pair<HostOffset, std::uint64_t>> freed_;
    RepairResult result_;
};

}  // namespace

Result<RepairResult> repair_image(std::shared_ptr<Storage> file, const Storage* data_file,
                                  const RepairOptions& options) {
    auto planned = TRY(PlannedFile::create(std::move(file), options.memory_bytes));
    auto result = TRY(Repair(planned, data_file, options).run());
    if (options.on_loss) {
        for (const auto& loss : result.losses) options.on_loss(loss);
    }
    TRY_VOID(verify_goes_on(options.control));
    if (!options.dry_run) TRY_VOID(planned->carry_out(options.control));
    return result;
}

}  // namespace qcow::qcow2
