#include "qcow2/metadata/change.h"

#include <algorithm>
#include <utility>

#include "base/invariant.h"
#include "base/try.h"
#include "base/within_memory.h"

namespace qcow::qcow2 {
namespace {

/// What was taken must not be lost because memory runs out. The capacity doubles, so that n parts cost n steps.
template <class T>
void reserve_one(std::vector<T>& parts) {
    if (parts.size() == parts.capacity()) parts.reserve(2 * parts.size() + 1);
}

}  // namespace

Change::Change(Change&& other) noexcept
    : metadata_(other.metadata_),
      taken_(std::exchange(other.taken_, {})),
      dropped_(std::exchange(other.dropped_, {})) {}

Change& Change::operator=(Change&& other) noexcept {
    std::swap(metadata_, other.metadata_);
    std::swap(taken_, other.taken_);
    std::swap(dropped_, other.dropped_);
    return *this;
}

Change::~Change() {
    // Without memory for that they stay counted: a leak, and no more.
    static_cast<void>(within_memory([&]() -> Result<void> {
        give_up(taken_);
        return {};
    }));
}

void Change::give_up(const std::vector<Part>& parts) {
    for (const auto& [run, table] : parts) metadata_->allocator_.retire(run, table);
}

ClusterRun Change::clusters_of(HostOffset at, std::uint64_t bytes) const {
    return qcow2::clusters_of(at, bytes, metadata_->metadata().header().cluster_bits);
}

Result<ClusterRun> Change::take(std::uint64_t guest, std::uint64_t wanted) {
    reserve_one(taken_);
    const auto run = TRY(metadata_->allocator_.take(guest, wanted));
    INVARIANT(run.count > 0 && run.count <= wanted);
    taken_.push_back({run});
    return run;
}

Result<HostOffset> Change::take_stream(std::uint64_t length) {
    reserve_one(taken_);
    const HostOffset at = TRY(metadata_->allocator_.take_bytes(length));
    taken_.push_back({clusters_of(at, length)});
    return at;
}

Result<HostOffset> Change::take_table(MetadataMap::Kind kind, std::uint64_t clusters) {
    auto& allocator = metadata_->allocator_;
    const std::uint64_t cluster_size = metadata_->metadata().cluster_size();
    reserve_one(taken_);
    const auto run = clusters == 1 ? ClusterRun{TRY(allocator.take_table()).value / cluster_size, 1}
                                   : TRY(allocator.take_contiguous(clusters));
    taken_.push_back({run});
    const HostOffset at{run.first * cluster_size};
    metadata_->metadata().words().forget(at, clusters * cluster_size);
    TRY_VOID(metadata_->map_.add(at, clusters * cluster_size, kind));
    taken_.back().table = true;
    return at;
}

void Change::drop(ClusterRun run) { dropped_.push_back({run}); }

void Change::drop_stream(const format::CompressedRange& range) {
    dropped_.push_back({clusters_of(range.offset, range.length)});
}

void Change::drop_table(HostOffset at, std::uint64_t bytes) { dropped_.push_back({clusters_of(at, bytes), true}); }

Result<void> Change::commit(HostOffset at, std::span<const std::uint64_t> words, Barrier barrier) {
    TRY_VOID(metadata_->write_back_.store(at, words, mapping_pages, barrier == Barrier::flush));
    commit();
    return {};
}

Result<void> Change::commit_header(const std::function<void(format::HeaderState&)>& change) {
    TRY_VOID(metadata_->change_header(change));
    commit();
    return {};
}

void Change::commit() {
    taken_.clear();
    give_up(dropped_);
    dropped_.clear();
}

Result<void> store_table(WritableMetadata& metadata, HostOffset at, std::span<const std::uint64_t> old,
                         std::span<const std::uint64_t> words) {
    auto& cache = metadata.metadata().words();
    const std::size_t page_words = cache.page_bytes() / 8;
    const auto page_of = [&](std::span<const std::uint64_t> table, std::size_t begin) {
        return table.subspan(begin, std::min(page_words, table.size() - begin));
    };
    const auto changed = [&](std::size_t begin) {
        return begin < words.size() && !std::ranges::equal(page_of(old, begin), page_of(words, begin));
    };
    for (std::size_t begin = 0; begin < words.size();) {
        std::size_t end = begin;
        while (changed(end)) end += page_words;
        if (end != begin) TRY_VOID(cache.reserve_space(at + begin * 8, (end - begin) * 8));
        for (; begin < end; begin += page_words) {
            Change change(metadata);
            TRY_VOID(change.commit(at + begin * 8, page_of(words, begin), Barrier::none));
        }
        begin = end + page_words;  // the page behind them is as it was
    }
    return {};
}

}  // namespace qcow::qcow2
