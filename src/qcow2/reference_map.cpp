#include "qcow2/reference_map.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"

namespace qcow::qcow2 {
namespace {

std::unexpected<Error> over_budget(std::size_t budget_bytes) {
    return fail(Errc::limit_exceeded, "",
                fmt::format("counting the references needs more than the {} KiB of memory that were allowed",
                            budget_bytes / KiB));
}

}  // namespace

Result<std::unique_ptr<ReferenceMap>> ReferenceMap::create(std::uint64_t clusters, std::size_t budget_bytes) {
    const std::uint64_t regions = divide_up(clusters, chunk_clusters * region_chunks);
    if (regions > budget_bytes / sizeof(std::atomic<Region*>)) return over_budget(budget_bytes);
    return std::unique_ptr<ReferenceMap>(new ReferenceMap(clusters, budget_bytes));
}

ReferenceMap::ReferenceMap(std::uint64_t clusters, std::size_t budget_bytes)
    : clusters_(clusters), budget_bytes_(budget_bytes), regions_(divide_up(clusters, chunk_clusters * region_chunks)) {
    used_bytes_ = regions_.size() * sizeof(std::atomic<Region*>);
}

ReferenceMap::Directory* ReferenceMap::find_directory(std::uint64_t chunk) const {
    const auto* region = regions_[chunk / region_chunks].load(std::memory_order_acquire);
    if (region == nullptr) return nullptr;
    return (*region)[chunk % region_chunks / directory_chunks].load(std::memory_order_acquire);
}

ReferenceMap::Chunk* ReferenceMap::find_chunk(std::uint64_t cluster) const {
    const std::uint64_t chunk = cluster / chunk_clusters;
    const auto* directory = find_directory(chunk);
    return directory == nullptr ? nullptr : (*directory)[chunk % directory_chunks].load(std::memory_order_acquire);
}

/// The node that `link` leads to; a new one where there is none. The caller holds `growth_`.
template <class Node>
Result<Node*> ReferenceMap::grow(std::atomic<Node*>& link, std::vector<std::unique_ptr<Node>>& owner) {
    if (auto* node = link.load(std::memory_order_relaxed)) return node;
    if (sizeof(Node) > budget_bytes_ - used_bytes_) return over_budget(budget_bytes_);
    owner.push_back(std::make_unique<Node>());
    used_bytes_ += sizeof(Node);
    link.store(owner.back().get(), std::memory_order_release);
    return owner.back().get();
}

Result<ReferenceMap::Chunk*> ReferenceMap::chunk_for(std::uint64_t cluster) {
    if (auto* chunk = find_chunk(cluster)) return chunk;
    const std::lock_guard lock(growth_);
    const std::uint64_t number = cluster / chunk_clusters;
    auto* region = TRY(grow(regions_[number / region_chunks], owned_regions_));
    auto* directory = TRY(grow((*region)[number % region_chunks / directory_chunks], owned_directories_));
    return grow((*directory)[number % directory_chunks], owned_chunks_);
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

Result<void> ReferenceMap::set(std::uint64_t cluster, References references) {
    if (references.word == 0 && find_chunk(cluster) == nullptr) return {};
    TRY(chunk_for(cluster))->references[cluster % chunk_clusters] = references;
    return {};
}

References ReferenceMap::at(std::uint64_t cluster) const {
    if (cluster >= clusters_) return {};
    const auto references = chunk_from(cluster);
    return references.empty() ? References{} : references.front();
}

std::span<const References> ReferenceMap::chunk_from(std::uint64_t cluster) const {
    const auto* chunk = find_chunk(cluster);
    if (chunk == nullptr) return {};
    return std::span(chunk->references).subspan(cluster % chunk_clusters);
}

std::uint64_t ReferenceMap::next_used(std::uint64_t first, std::uint64_t last) const {
    const std::uint64_t end = std::min(last, clusters_);
    while (first < end) {
        constexpr std::uint64_t directory_clusters = chunk_clusters * directory_chunks;
        constexpr std::uint64_t region_clusters = chunk_clusters * region_chunks;
        const auto* region = regions_[first / region_clusters].load(std::memory_order_acquire);
        if (region == nullptr || find_directory(first / chunk_clusters) == nullptr) {
            const auto skipped = region == nullptr ? region_clusters : directory_clusters;
            first = align_down(first, skipped) + skipped;
            continue;
        }
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
