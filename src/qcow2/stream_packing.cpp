#include "qcow2/stream_packing.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "base/endian.h"
#include "base/try.h"
#include "base/workers.h"
#include "codec/compressor.h"
#include "format/refcount.h"
#include "qcow2/sound_visitor.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t sector = 512;
constexpr std::size_t max_streams = std::size_t{1} << 21;

class StreamSearch : public SoundVisitor {
public:
    StreamSearch(const Metadata& metadata, std::span<const std::uint64_t> sources)
        : SoundVisitor(metadata), cluster_bits_(metadata.geometry().cluster_bits), sources_(sources) {}

    Result<void> reference(const Reference& reference) override {
        if (reference.kind != Structure::compressed) return {};
        const std::uint64_t last = (reference.at.value + reference.bytes - 1) >> cluster_bits_;
        const auto source = std::ranges::lower_bound(sources_, reference.at.value >> cluster_bits_);
        if (source == sources_.end() || *source > last) return {};
        const std::lock_guard lock(mutex_);
        if (streams_.size() == max_streams)
            return fail(Errc::limit_exceeded, "",
                        fmt::format("more than {} entries lead to a few clusters", max_streams));
        streams_.push_back({reference.at, reference.bytes, {}, reference.count});
        return {};
    }

    /// Each stream once.
    std::vector<StreamMove> take() {
        Moves moves;
        moves.streams = std::move(streams_);
        moves.sort();
        std::vector<StreamMove> result;
        for (const auto& stream : moves.streams) {
            if (!result.empty() && result.back().from == stream.from && result.back().length == stream.length) {
                result.back().references += stream.references;
            } else {
                result.push_back(stream);
            }
        }
        return result;
    }

private:
    const unsigned cluster_bits_;
    const std::span<const std::uint64_t> sources_;
    std::mutex mutex_;
    std::vector<StreamMove> streams_;
};

/// Finds out which data clusters have other entries than plain ones of whole clusters.
class PlainSearch : public SoundVisitor {
public:
    PlainSearch(const Metadata& metadata, std::span<const std::uint64_t> clusters)
        : SoundVisitor(metadata), clusters_(clusters), plain_(clusters.size(), true) {}

    Result<void> reference(const Reference& reference) override {
        if (reference.kind != Structure::data) return {};
        const auto& geometry = metadata_.geometry();
        const std::uint64_t first = reference.at.value >> geometry.cluster_bits;
        const std::uint64_t end = first + (reference.bytes >> geometry.cluster_bits);
        auto at = std::ranges::lower_bound(clusters_, first);
        if (at == clusters_.end() || *at >= end) return {};
        // All entries of a run are alike.
        format::L2Entry entry{reference.word};
        if (geometry.extended_l2) {
            std::array<std::byte, 8> bitmap = {};
            TRY(metadata_.file().read(reference.place.at + 8, bitmap));
            entry.bitmap = load_be<std::uint64_t>(bitmap, 0);
        }
        const auto run = metadata_.rules().run(entry, 0);
        if (run.kind == format::ClusterKind::data && run.count == (geometry.extended_l2 ? 32U : 1U)) return {};
        const std::lock_guard lock(mutex_);
        for (; at != clusters_.end() && *at < end; ++at)
            plain_[static_cast<std::size_t>(at - clusters_.begin())] = false;
        return {};
    }

    [[nodiscard]] std::vector<std::uint64_t> found() const {
        std::vector<std::uint64_t> result;
        for (std::size_t i = 0; i < clusters_.size(); ++i) {
            if (plain_[i]) result.push_back(clusters_[i]);
        }
        return result;
    }

private:
    const std::span<const std::uint64_t> clusters_;
    std::mutex mutex_;
    std::vector<bool> plain_;
};

class Packer {
public:
    Packer(const Metadata& metadata, std::span<const ClusterRun> free)
        : cluster_bits_(metadata.geometry().cluster_bits),
          most_(format::max_refcount(metadata.header().refcount_order)),
          limit_(bit(format::compressed_offset_bits(cluster_bits_))),
          free_(free) {}

    /// Returns whether the stream got a place. Streams come by `from`.
    bool place(StreamMove& stream) {
        if (previous_ && stream.from.value < previous_->from.value + previous_->length) {
            // It shares a sector with the previous one.
            const HostOffset at = previous_->to + (stream.from - previous_->from);
            if (take(stream, at)) return true;
        } else if (take(stream, {end_ + stream.from.value % sector})) {
            return true;
        }
        // Behind the cluster that is full of references, or in the next run.
        for (;;) {
            const std::uint64_t next_cluster = align_down(end_ + low_bits(cluster_bits_), bit(cluster_bits_));
            if (next_cluster < run_end_ && take(stream, {next_cluster + stream.from.value % sector})) return true;
            if (next_ == free_.size()) return false;
            run_end_ = free_[next_].end() << cluster_bits_;
            end_ = free_[next_++].first << cluster_bits_;
            if (take(stream, {end_ + stream.from.value % sector})) return true;
        }
    }

private:
    bool take(StreamMove& stream, HostOffset at) {
        if (at.value + stream.length > run_end_ || at.value >= limit_) return false;
        const std::uint64_t first = at.value >> cluster_bits_;
        const std::uint64_t last = (at.value + stream.length - 1) >> cluster_bits_;
        // The newest cluster may hold others. Those behind it are empty.
        if (last_cluster_ && *last_cluster_ > first) return false;
        const std::uint64_t there = last_cluster_ == first ? last_count_ : 0;
        if (stream.references > most_ - std::min(most_, there)) return false;
        last_count_ = (first == last ? there : 0) + stream.references;
        last_cluster_ = last;
        stream.to = at;
        previous_ = stream;
        end_ = std::max(end_, at.value + stream.length);
        return true;
    }

    const unsigned cluster_bits_;
    const std::uint64_t most_;
    const std::uint64_t limit_;
    const std::span<const ClusterRun> free_;
    std::size_t next_ = 0;       // run
    std::uint64_t end_ = 0;      // of what is taken in the present run, in whole sectors
    std::uint64_t run_end_ = 0;  // bytes
    std::optional<StreamMove> previous_;
    std::optional<std::uint64_t> last_cluster_;
    std::uint64_t last_count_ = 0;  // references to that cluster
};

/// Walks over the mapping alone.
Result<void> walk_mapping(const Metadata& metadata, unsigned workers, Visitor& visitor) {
    WalkOptions options;
    options.refcounts = false;
    options.workers = workers;
    TRY(walk(metadata, TRY(walked_length(metadata)), options, visitor));
    return {};
}

}  // namespace

Result<std::vector<StreamMove>> find_streams(const Metadata& metadata, std::span<const std::uint64_t> sources,
                                             unsigned workers) {
    StreamSearch search(metadata, sources);
    TRY_VOID(walk_mapping(metadata, workers, search));
    return search.take();
}

Result<std::vector<std::uint64_t>> find_plain_clusters(const Metadata& metadata,
                                                       std::span<const std::uint64_t> clusters, unsigned workers) {
    PlainSearch search(metadata, clusters);
    TRY_VOID(walk_mapping(metadata, workers, search));
    return search.found();
}

Result<std::vector<CompressedCluster>> compress_clusters(const Metadata& metadata, const ReferenceMap& references,
                                                         std::span<const std::uint64_t> clusters,
                                                         std::optional<int> level, unsigned workers) {
    std::vector<CompressedCluster> result(clusters.size());
    std::atomic<std::size_t> next = 0;
    const std::uint64_t cluster_size = metadata.cluster_size();
    TRY_VOID(run_workers(
        workers == 0 ? default_workers() : workers,
        [&](unsigned) -> Result<void> {
            const auto compressor = TRY(codec::make_compressor(metadata.header().compression, level));
            std::vector<std::byte> data(cluster_size);
            std::vector<std::byte> stream(cluster_size - 1);
            for (std::size_t i = next++; i < clusters.size(); i = next++) {
                TRY(metadata.file().read({clusters[i] << metadata.geometry().cluster_bits}, data));
                const auto length = static_cast<std::ptrdiff_t>(compressor->compress(data, stream));
                result[i] = {
                    clusters[i], {}, references.at(clusters[i]).count(), {stream.begin(), stream.begin() + length}};
            }
            return {};
        }));
    std::erase_if(result, [](const auto& one) { return one.stream.empty(); });
    return result;
}

void pack_compressed(const Metadata& metadata, std::span<const ClusterRun> free,
                     std::vector<CompressedCluster>& compressed) {
    const unsigned cluster_bits = metadata.geometry().cluster_bits;
    const std::uint64_t most = format::max_refcount(metadata.header().refcount_order);
    const std::uint64_t limit = bit(format::compressed_offset_bits(cluster_bits));
    std::uint64_t at = 0;
    std::uint64_t run_end = 0;
    std::uint64_t in_last = 0;  // references to the cluster that `at` is in
    auto next = free.begin();
    std::size_t placed = 0;
    for (auto& one : compressed) {
        const auto next_cluster = [&] { return align_down(at + low_bits(cluster_bits), bit(cluster_bits)); };
        if (!is_aligned(at, bit(cluster_bits)) && one.references > most - std::min(most, in_last)) at = next_cluster();
        while (at + one.stream.size() > run_end && next != free.end()) {
            at = next->first << cluster_bits;
            run_end = next->end() << cluster_bits;
            ++next;
        }
        if (at + one.stream.size() > run_end || at >= limit) break;
        one.to = {at};
        const bool shares = !is_aligned(at, bit(cluster_bits));
        const std::uint64_t first = at >> cluster_bits;
        at += one.stream.size();
        in_last = (shares && (at - 1) >> cluster_bits == first ? in_last : 0) + one.references;
        ++placed;
    }
    compressed.resize(placed);
}

void pack_streams(const Metadata& metadata, std::span<const ClusterRun> free, std::vector<StreamMove>& streams) {
    Packer packer(metadata, free);
    std::size_t placed = 0;
    while (placed < streams.size() && packer.place(streams[placed])) ++placed;
    streams.resize(placed);
}

}  // namespace qcow::qcow2
