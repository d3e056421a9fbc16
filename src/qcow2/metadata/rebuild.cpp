// The refcounts of an image that was not closed, counted again.

#include <fmt/format.h>

#include <algorithm>

#include "base/try.h"
#include "qcow2/image_check.h"
#include "qcow2/metadata/allocator.h"

namespace qcow::qcow2 {
namespace {

/// A cluster of each refcount block that there should be, for what is referenced, and is not.
std::vector<std::uint64_t> uncovered(const ReferenceMap& references, const Refcounts& refcounts) {
    std::vector<std::uint64_t> clusters;
    for (std::uint64_t cluster = 0; cluster < references.clusters();) {
        cluster = references.next_used(cluster, references.clusters());
        if (cluster < references.clusters() && !refcounts.is_covered(cluster)) clusters.push_back(cluster);
        cluster = (cluster / refcounts.per_block() + 1) * refcounts.per_block();
    }
    return clusters;
}

}  // namespace

Result<void> Allocator::rebuild() {
    const std::lock_guard lock(mutex_);
    auto references = TRY(count_references(metadata_, {}));
    // A cluster may be in use behind a file that lost its length, and nothing else has counted it yet.
    if (references->at(references->clusters() - 1).count() != 0)
        counted_end_ = std::max(counted_end_, references->clusters());
    if (const auto missing = uncovered(*references, refcounts_); !missing.empty()) {
        TRY_VOID(refcounts_.add_blocks_for(missing, TRY(tail())));
        references = TRY(count_references(metadata_, {}));  // the blocks, too
    }
    // The writes may come in any order: nobody believes refcounts as long as the image is marked as dirty.
    const std::uint64_t end = std::max(references->clusters(), TRY(tail()));
    for (std::uint64_t cluster = 0; cluster < end;) {
        const std::uint64_t wanted = cluster < references->clusters() ? references->at(cluster).count() : 0;
        const std::uint64_t found = TRY(refcounts_.get(cluster));
        if (wanted == 0 && found == 0) {
            // A file that is mostly a hole may be very long.
            const std::uint64_t counted = TRY(refcounts_.next_counted(cluster, end));
            cluster = references->next_used(cluster, counted);
            continue;
        }
        if (wanted != found) TRY_VOID(refcounts_.set(cluster, wanted));
        ++cluster;
    }
    search_from_ = 0;
    TRY_VOID(write_back_.write_refcounts());
    TRY_VOID(find_counted_end());  // which looks for holes in the file
    return write_back_.sync();
}

}  // namespace qcow::qcow2
