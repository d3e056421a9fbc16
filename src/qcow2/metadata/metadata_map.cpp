#include "qcow2/metadata/metadata_map.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>

#include "base/bits.h"
#include "base/try.h"
#include "qcow/text.h"
#include "qcow2/walker.h"

namespace qcow::qcow2 {
namespace {

constexpr std::array<std::string_view, 8> names = {"the header",         "an L1 table",          "an L2 table",
                                                   "the refcount table", "a refcount block",     "the snapshot table",
                                                   "a bitmap",           "the encryption header"};

/// What a chunk of clusters is in the filter: never the number of a cluster.
std::uint64_t key_of_chunk(std::uint64_t chunk) { return ~chunk; }

MetadataMap::Kind kind_of(Structure structure) {
    using Kind = MetadataMap::Kind;
    switch (structure) {
        case Structure::encryption_header: return Kind::encryption;
        case Structure::refcount_table: return Kind::refcount_table;
        case Structure::refcount_block: return Kind::refcount_block;
        case Structure::l1_table: return Kind::l1_table;
        case Structure::l2_table: return Kind::l2_table;
        case Structure::snapshot_table: return Kind::snapshots;
        case Structure::bitmap_directory:
        case Structure::bitmap:
        case Structure::bitmap_table:
        case Structure::bitmap_bits: return Kind::bitmaps;
        case Structure::header:
        case Structure::data:
        case Structure::compressed: break;
    }
    return Kind::header;
}

}  // namespace

/// Adds what a walk visits. The first flaw that hides something from it is an error.
class MetadataMap::Loader : public Visitor {
public:
    Loader(MetadataMap& map, const Storage& file, std::uint64_t file_bytes, std::uint64_t cluster_size)
        : map_(map), file_(file), file_end_(divide_up(file_bytes, cluster_size) * cluster_size) {}

    Result<void> reference(const Reference& reference) override {
        if (map_.runs_.size() >= max_runs) {
            return too_large("metadata", fmt::format("they lie in more than {} places; remove bitmaps with another "
                                                     "program",
                                                     max_runs));
        }
        return map_.add(reference.at, reference.bytes, kind_of(reference.kind));
    }

    Result<void> flaw(const Flaw& flaw) override {
        if (!flaw.hides_references) return {};
        const auto kind = kind_of(flaw.target);
        switch (flaw.kind) {
            case Flaw::Kind::unusable: return std::unexpected(*flaw.reason);
            case Flaw::Kind::overlap: return map_.add(flaw.at, flaw.bytes, kind);
            case Flaw::Kind::too_long: return refuse_length(flaw);
            default: break;
        }
        // The file's last cluster may be short.
        if (flaw.kind == Flaw::Kind::past_end && lies_within(flaw.at.value, flaw.bytes, file_end_))
            return map_.add(flaw.at, flaw.bytes, kind);
        return fail(Errc::corrupt, file_.name(),
                    fmt::format("{} at host offset {:#x} is not aligned or does not lie within the file; check the "
                                "image before it is written",
                                names[static_cast<std::size_t>(kind)], flaw.at.value));
    }

    [[nodiscard]] std::uint64_t next_used(std::uint64_t first, std::uint64_t end) const override {
        const auto found = map_.first_in(first, end);
        return found == map_.runs_.end() ? end : std::max(first, found->first);
    }

private:
    [[nodiscard]] std::unexpected<Error> too_large(const std::string& thing, const std::string& what) const {
        return fail(Errc::limit_exceeded, fmt::format("{}: {}", file_.name(), thing),
                    what + ", or open the image for reading only");
    }

    [[nodiscard]] Result<void> refuse_length(const Flaw& flaw) const {
        const auto name = printable(flaw.place.name.value_or(""));
        const std::uint64_t entries = flaw.bytes / 8;
        if (flaw.target == Structure::l1_table) {
            return too_large(
                fmt::format("the L1 table of snapshot \"{}\" (host offset {:#x})", name, flaw.at.value),
                fmt::format("its {} entries are more than 32 MiB; delete the snapshot with another program", entries));
        }
        return too_large(fmt::format("bitmap \"{}\" (table at host offset {:#x})", name, flaw.at.value),
                         fmt::format("its {} table entries stand for more than 512 MiB of bits; remove it with another "
                                     "program",
                                     entries));
    }

    MetadataMap& map_;
    const Storage& file_;
    std::uint64_t file_end_;
};

Result<void> MetadataMap::load(const Metadata& metadata) {
    {
        const std::lock_guard lock(mutex_);
        runs_.clear();
    }
    const std::uint64_t file_bytes = TRY(walked_length(metadata));
    Loader loader(*this, metadata.file(), file_bytes, metadata.cluster_size());
    WalkOptions options;
    options.guest_data = false;
    TRY(walk(metadata, file_bytes, options, loader));
    return {};
}

void MetadataMap::put_in_filter(std::uint64_t key) {
    const std::uint64_t bit_index = hash(key);
    filter_[bit_index / 64].fetch_or(bit(bit_index % 64), std::memory_order_relaxed);
}

bool MetadataMap::in_filter(std::uint64_t key) const {
    const std::uint64_t bit_index = hash(key);
    return (filter_[bit_index / 64].load(std::memory_order_relaxed) & bit(bit_index % 64)) != 0;
}

/// The first run that has clusters in [first, end).
MetadataMap::Runs::const_iterator MetadataMap::first_in(std::uint64_t first, std::uint64_t end) const {
    auto found = runs_.upper_bound(first);
    if (found != runs_.begin() && std::prev(found)->second.end > first) --found;
    return found != runs_.end() && found->first < end ? found : runs_.end();
}

Result<void> MetadataMap::add(HostOffset at, std::uint64_t length, Kind kind) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t first = at.value >> cluster_bits_;
    const std::uint64_t end = end_of(at, length);
    if (first == end) return {};
    if (const auto there = first_in(first, end); there != runs_.end()) {
        return fail(
            Errc::corrupt, fmt::format("host offset {:#x}", std::max(first, there->first) << cluster_bits_),
            fmt::format("{} and {} overlap here; check the image before it is written",
                        names[static_cast<std::size_t>(there->second.kind)], names[static_cast<std::size_t>(kind)]));
    }
    // By its own length, whatever it becomes one with.
    if (end - first <= bit(chunk_bits)) {
        for (auto cluster = first; cluster < end; ++cluster) put_in_filter(cluster);
    } else {
        for (auto chunk = first >> chunk_bits; chunk <= (end - 1) >> chunk_bits; ++chunk)
            put_in_filter(key_of_chunk(chunk));
    }
    const auto next = runs_.lower_bound(end);
    if (next != runs_.begin()) {
        const auto before = std::prev(next);
        if (before->second.end == first && before->second.kind == kind) {
            before->second.end = end;
            return {};
        }
    }
    runs_.emplace_hint(next, first, Run{end, kind});
    return {};
}

void MetadataMap::remove(HostOffset at, std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t first = at.value >> cluster_bits_;
    const std::uint64_t end = end_of(at, length);
    for (auto found = first_in(first, end); found != runs_.end(); found = first_in(first, end)) {
        const auto [begin, run] = *found;
        // First of all what may fail for want of memory.
        if (run.end > end) runs_.emplace(end, Run{run.end, run.kind});
        if (begin < first) {
            runs_.at(begin).end = first;
        } else {
            runs_.erase(found);
        }
    }
}

std::uint64_t MetadataMap::end() const {
    const std::lock_guard lock(mutex_);
    return runs_.empty() ? 0 : runs_.rbegin()->second.end;
}

std::string_view MetadataMap::find(HostOffset at, std::uint64_t length) const {
    const std::uint64_t end = end_of(at, length);
    for (std::uint64_t cluster = at.value >> cluster_bits_; cluster < end; ++cluster) {
        if (!in_filter(cluster) && !in_filter(key_of_chunk(cluster >> chunk_bits))) continue;
        const std::lock_guard lock(mutex_);
        const auto found = first_in(cluster, end);
        return found == runs_.end() ? std::string_view() : names[static_cast<std::size_t>(found->second.kind)];
    }
    return {};
}

}  // namespace qcow::qcow2
