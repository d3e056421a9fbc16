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
    if (divide_up(clusters, chunk_clusters) > budget_bytes / sizeof(std::atomic<Chunk*>))
        return over_budget(budget_bytes);
    return std::unique_ptr<ReferenceMap>(new ReferenceMap(clusters, budget_bytes));
}

ReferenceMap::ReferenceMap(std::uint64_t clusters, std::size_t budget_bytes)
    : clusters_(clusters), budget_bytes_(budget_bytes), chunks_(divide_up(clusters, chunk_clusters)) {}

Result<ReferenceMap::Chunk*> ReferenceMap::chunk_for(std::uint64_t cluster) {
    auto& slot = chunks_[cluster / chunk_clusters];
    if (auto* chunk = slot.load(std::memory_order_acquire)) return chunk;
    const std::lock_guard lock(growth_);
    if (auto* chunk = slot.load(std::memory_order_relaxed)) return chunk;
    if ((owned_.size() + 1) * sizeof(Chunk) + chunks_.size() * sizeof(chunks_[0]) > budget_bytes_) {
        return over_budget(budget_bytes_);
    }
    owned_.push_back(std::make_unique<Chunk>());
    slot.store(owned_.back().get(), std::memory_order_release);
    return owned_.back().get();
}

Result<void> ReferenceMap::add(std::uint64_t first, std::uint64_t length, std::uint64_t count, std::uint32_t kind) {
    const auto more = static_cast<std::uint32_t>(std::min<std::uint64_t>(count, References::max_count));
    while (length > 0) {
        auto& chunk = *TRY(chunk_for(first));
        const std::uint64_t begin = first % chunk_clusters;
        const std::uint64_t piece = std::min(length, chunk_clusters - begin);
        const std::lock_guard lock(chunk.mutex);
        for (auto& references : std::span(chunk.references).subspan(begin, piece)) {
            const std::uint32_t sum = std::min(references.count() + more, References::max_count);
            references.word = (references.word & ~References::max_count) | kind | sum;
        }
        first += piece;
        length -= piece;
    }
    return {};
}

References ReferenceMap::at(std::uint64_t cluster) const {
    if (cluster >= clusters_) return {};
    const auto references = chunk_from(cluster);
    return references.empty() ? References{} : references.front();
}

std::span<const References> ReferenceMap::chunk_from(std::uint64_t cluster) const {
    const auto* chunk = chunks_[cluster / chunk_clusters].load(std::memory_order_acquire);
    if (chunk == nullptr) return {};
    return std::span(chunk->references).subspan(cluster % chunk_clusters);
}

std::uint64_t ReferenceMap::next_used(std::uint64_t first, std::uint64_t last) const {
    const std::uint64_t end = std::min(last, clusters_);
    while (first < end) {
        const std::uint64_t piece = std::min(end - first, chunk_clusters - first % chunk_clusters);
        const auto references = chunk_from(first);
        for (std::uint64_t i = 0; i < std::min<std::uint64_t>(piece, references.size()); ++i) {
            if (references[i].word != 0) return first + i;
        }
        first += piece;
    }
    return last;
}

}  // namespace qcow::qcow2
