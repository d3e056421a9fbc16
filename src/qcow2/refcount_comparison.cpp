#include "qcow2/refcount_comparison.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/workers.h"
#include "format/refcount.h"
#include "qcow2/walker.h"

namespace qcow::qcow2 {
namespace {

using Finding = CheckFinding::Kind;
using Remedy = CheckFinding::Remedy;
using Severity = CheckFinding::Severity;

std::string use_names(std::uint32_t uses) {
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

/// Whether a cluster has several uses that exclude each other.
bool overlap(References references) {
    const std::uint32_t uses = references.word & References::uses;
    return (uses & (uses - 1)) != 0 || ((uses & References::metadata) != 0 && references.count() > 1);
}

class Comparison {
public:
    Comparison(const CountedReferences& counted, Findings& findings)
        : metadata_(counted.metadata),
          geometry_(counted.metadata.geometry()),
          references_(counted.references),
          blocks_(counted.blocks),
          file_clusters_(geometry_.clusters(counted.file_bytes)),
          refcount_order_(metadata_.header().refcount_order),
          dirty_(metadata_.state().has(format::incompatible::dirty)),
          uncounted_(counted.uncounted),
          workers_(counted.workers == 0 ? default_workers() : counted.workers),
          control_(counted.control),
          findings_(findings) {}

    Result<ComparedRefcounts> run() {
        if (blocks_.empty()) {
            find_image_end();
        } else {
            TRY_VOID(compare_blocks());
        }
        ComparedRefcounts result;
        result.image_end = end_ << geometry_.cluster_bits;
        result.counted_past_end = counted_past_end_;
        if (undercounted_) result.undercounted = std::move(undercounted_->second);
        return result;
    }

private:
    void find_image_end() {
        for (std::uint64_t i = 0; (i = references_.next_used(i, references_.clusters())) < references_.clusters();)
            end_ = ++i;
    }

    Result<void> compare_blocks() {
        report_overlapping_blocks();
        std::atomic<std::size_t> next = 0;
        const std::uint64_t per_block = format::refcounts_per_block(geometry_.cluster_bits, refcount_order_);
        std::mutex mutex;
        TRY_VOID(run_workers(
            workers_,
            [&](unsigned) -> Result<void> {
                std::vector<std::byte> buffer(geometry_.cluster_size());
                std::uint64_t end = 0;
                for (std::size_t i = next++; i < blocks_.size(); i = next++) {
                    TRY_VOID(verify_goes_on(control_));
                    TRY_VOID(compare_block(i * per_block, per_block, blocks_[i], buffer, end));
                }
                const std::lock_guard lock(mutex);
                end_ = std::max(end_, end);
                return {};
            }));
        compare_with_zero(blocks_.size() * per_block, references_.clusters(), end_);
        return {};
    }

    /// What a block says cannot be believed if something else lies there, too.
    [[nodiscard]] bool is_shared(HostOffset block) const {
        return block.value != 0 && references_.at(block.value >> geometry_.cluster_bits).count() != 1;
    }

    /// One finding for all of them: a million entries may name one block.
    void report_overlapping_blocks() {
        const auto shared = [this](HostOffset block) { return is_shared(block); };
        const auto count = static_cast<std::uint64_t>(std::ranges::count_if(blocks_, shared));
        if (count == 0) return;
        const auto first = std::ranges::find_if(blocks_, shared);
        const auto index = first - blocks_.begin();
        note_undercounted(
            *first, [&] { return fmt::format("refcount block at host offset {:#x}", first->value); },
            [] { return std::string("something else lies there, too, so that its refcounts cannot be believed"); });
        findings_.add(Severity::corruption, first->value, count, [&] {
            return CheckFinding{Severity::corruption,
                                fmt::format("refcount table entry {}", index),
                                fmt::format("overlap: the block at host offset {:#x} is in use as something else, or "
                                            "for another entry, so that it was not believed; there are {} such entries",
                                            first->value, count),
                                Finding::overlap,
                                *first,
                                Remedy::rebuild_refcounts};
        });
    }

    /// The clusters that one block describes, `per_block` from `first` on.
    Result<void> compare_block(std::uint64_t first, std::uint64_t per_block, HostOffset block,
                               std::span<std::byte> buffer, std::uint64_t& end) {
        if (is_shared(block)) return {};
        const std::uint64_t last = first + per_block;
        if (block.value == 0 || TRY(is_hole(metadata_.file(), block, buffer.size()))) {
            compare_with_zero(first, last, end);
            return {};
        }
        TRY(metadata_.file().read(block, buffer));
        const auto refcounts = std::span<const std::byte>(buffer);
        const unsigned order = refcount_order_;
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

    void compare(std::uint64_t cluster, std::uint64_t refcount, References references, std::uint64_t& end) {
        if (references.word == 0) {
            if (refcount == 0) return;
            if (cluster >= file_clusters_) {
                ++counted_past_end_;
                return;
            }
        }
        end = std::max(end, cluster + 1);
        const auto wrong_mark = refcount == 1 ? References::not_copied : References::copied;
        if (std::min<std::uint64_t>(refcount, References::max_count) != references.count() || overlap(references) ||
            (references.word & wrong_mark) != 0) {
            report(cluster, refcount, references);
        }
    }

    /// Something about a cluster and its refcount; `what` makes the text.
    template <class What>
    void add(Severity severity, Finding kind, Remedy remedy, HostOffset at, const What& what) {
        findings_.add(severity, at.value, 1, [&] {
            return CheckFinding{severity, text_of({Structure::data, at, at}), what(), kind, at, remedy};
        });
    }

    void report(std::uint64_t cluster, std::uint64_t refcount, References references) {
        const HostOffset at{cluster << geometry_.cluster_bits};
        if (overlap(references)) {
            add(Severity::corruption, Finding::overlap, Remedy::copy_contents, at, [&] {
                return fmt::format("overlap: it is used as {}, {} times in all",
                                   use_names(references.word & References::uses), references.count());
            });
        }
        const bool postponed = report_count(at, refcount, references);
        report_mark(at, postponed ? references.count() : refcount, references);
    }

    /// A refcount that differs from the count of references. Returns whether a rebuild of the refcounts at the next
    /// opening mends it.
    bool report_count(HostOffset at, std::uint64_t refcount, References references) {
        const std::uint64_t counted = references.count();
        const std::uint64_t comparable = std::min<std::uint64_t>(refcount, References::max_count);
        if (comparable > counted && uncounted_) {
            add(Severity::error, Finding::uncounted, Remedy::nothing, at, [&] {
                return fmt::format(
                    "could not be counted: refcount {}, and {} references that are known; it may "
                    "belong to what is damaged",
                    refcount, counted);
            });
        } else if (comparable != counted && dirty_ && counted <= format::max_refcount(refcount_order_)) {
            add(Severity::postponed, Finding::refcount_old, Remedy::rebuild_refcounts, at,
                [&] { return fmt::format("refcount {}, but {} references", refcount, counted); });
            return true;
        } else if (comparable < counted) {
            const auto what = [&] {
                return fmt::format("refcount {} is less than its {} references ({})", refcount, counted,
                                   use_names(references.word & References::uses));
            };
            add(Severity::corruption, Finding::refcount_too_low, Remedy::rebuild_refcounts, at, what);
            note_undercounted(at, what);
        } else if (comparable > counted) {
            add(Severity::leak, Finding::leak, Remedy::rebuild_refcounts, at,
                [&] { return fmt::format("leaked: refcount {}, but {} references", refcount, counted); });
        }
        return false;
    }

    /// A COPIED flag that contradicts the refcount. A rebuild of the refcounts corrects the flags, too.
    void report_mark(HostOffset at, std::uint64_t refcount, References references) {
        const auto severity = dirty_ ? Severity::postponed : Severity::corruption;
        const auto* const table = (references.word & References::uses) == References::l2_table ? "L1" : "L2";
        if (refcount != 1 && (references.word & References::copied) != 0) {
            const auto what = [&] {
                return fmt::format("its {} entry is marked COPIED, but its refcount is {}", table, refcount);
            };
            add(severity, Finding::copied_flag, Remedy::correct_entry, at, what);
            if (references.count() > 1) note_undercounted(at, what);
        }
        if (refcount == 1 && (references.word & References::not_copied) != 0) {
            add(severity, Finding::copied_flag, Remedy::correct_entry, at,
                [&] { return fmt::format("its {} entry is not marked COPIED, but its refcount is 1", table); });
        }
    }

    template <class What>
    void note_undercounted(HostOffset at, const What& what) {
        note_undercounted(at, [&] { return text_of({Structure::data, at, at}); }, what);
    }

    template <class Where, class What>
    void note_undercounted(HostOffset at, const Where& where, const What& what) {
        const std::lock_guard lock(undercounted_mutex_);
        if (undercounted_ && undercounted_->first <= at) return;
        undercounted_.emplace(at, Error{Errc::corrupt, where(), what()});
    }

    const Metadata& metadata_;
    const format::Geometry& geometry_;
    const ReferenceMap& references_;
    const std::span<const HostOffset> blocks_;
    const std::uint64_t file_clusters_;
    const unsigned refcount_order_;
    const bool dirty_;
    const bool uncounted_;
    const unsigned workers_;
    const JobControl& control_;
    Findings& findings_;

    std::uint64_t end_ = 0;  // the cluster behind the last one that is in use
    std::atomic<std::uint64_t> counted_past_end_ = 0;
    std::mutex undercounted_mutex_;
    std::optional<std::pair<HostOffset, Error>> undercounted_;
};

}  // namespace

Result<ComparedRefcounts> compare_refcounts(const CountedReferences& counted, Findings& findings) {
    return Comparison(counted, findings).run();
}

}  // namespace qcow::qcow2
