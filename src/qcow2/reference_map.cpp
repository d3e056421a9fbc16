#include "qcow2/reference_map.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"

namespace qcow::qcow2 {
namespace {

std::unexpected<Error> over_budget(std::size_t budget_bytes) {
    return fail(Errc::limit_exceeded, "",
                fmt::format("counting the references needs more than the {} MiB of memory that were allowed",
                            budget_bytes / MiB));
}

}  // namespace

Result<std::unique_ptr<ReferenceMap>> ReferenceMap::create(std::uint64_t clusters, std::size_t budget_bytes) {
    if (divide_up(clusters, chunk_clusters) > budget_bytes / sizeof(std::atomic<Cell*>))
        return over_budget(budget_bytes);
    return std::unique_ptr<ReferenceMap>(new ReferenceMap(clusters, budget_bytes));
}

ReferenceMap::ReferenceMap(std::uint64_t clusters, std::size_t budget_bytes)
    : clusters_(clusters), budget_bytes_(budget_bytes), chunks_(divide_up(clusters, chunk_clusters)) {}

Result<ReferenceMap::Cell*> ReferenceMap::chunk_for(std::uint64_t cluster) {
    auto& slot = chunks_[cluster / chunk_clusters];
    if (auto* chunk = slot.load(std::memory_order_acquire)) return chunk;
    const std::lock_guard lock(growth_);
    if (auto* chunk = slot.load(std::memory_order_relaxed)) return chunk;
    const std::size_t bytes = (owned_.size() + 1) * chunk_clusters * sizeof(Cell) + chunks_.size() * sizeof(chunks_[0]);
    if (bytes > budget_bytes_) return over_budget(budget_bytes_);
    owned_.push_back(std::make_unique<Cell[]>(chunk_clusters));
    slot.store(owned_.back().get(), std::memory_order_release);
    return owned_.back().get();
}

Result<void> ReferenceMap::add(std::uint64_t cluster, std::uint64_t count, std::uint32_t kind) {
    auto& cell = TRY(chunk_for(cluster))[cluster % chunk_clusters];
    std::uint32_t old = cell.load(std::memory_order_relaxed);
    std::uint32_t updated = 0;
    do {
        const auto sum = std::min<std::uint64_t>(
            References{old}.count() + std::min<std::uint64_t>(count, References::max_count), References::max_count);
        updated = (old & ~References::max_count) | kind | static_cast<std::uint32_t>(sum);
    } while (!cell.compare_exchange_weak(old, updated, std::memory_order_relaxed));
    return {};
}

References ReferenceMap::at(std::uint64_t cluster) const {
    if (cluster >= clusters_) return {};
    const auto* chunk = chunk_if_used(cluster);
    return {chunk == nullptr ? 0 : chunk[cluster % chunk_clusters].load(std::memory_order_relaxed)};
}

std::uint64_t ReferenceMap::next_used(std::uint64_t cluster) const {
    while (cluster < clusters_ && chunk_if_used(cluster) == nullptr)
        cluster = align_down(cluster, chunk_clusters) + chunk_clusters;
    return std::min(cluster, clusters_);
}

}  // namespace qcow::qcow2
