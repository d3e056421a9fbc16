#pragma once
// What is done to images of every kind, to see what power losses and faults make of it.

#include <fmt/format.h>

#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/image_kinds.h"
#include "engine/workload.h"
#include "qcow/copy.h"
#include "qcow2/compaction.h"

namespace qcow::test {

struct Work {
    enum class Job : std::uint8_t { none, convert, convert_compressed };

    std::string name;
    ImageKind kind;
    Mix mix = {};
    unsigned steps = 60;  ///< of each thread
    unsigned threads = 1;
    bool close = true;      ///< in order; else the image is dropped with writes that were not flushed
    Job job = Job::none;    ///< done first, and flushed
    bool full = false;      ///< room comes and goes meanwhile
    bool compact = false;   ///< the file is compacted in the end
    bool compress = false;  ///< and its data are compressed then
};

inline void PrintTo(const Work& work, std::ostream* out) { *out << work.name; }

/// Small, so that it is made and checked quickly.
inline ImageKind small(const std::string& name, std::uint64_t size = std::uint64_t{1} << 20) {
    static const auto kinds = image_kinds();  // each process of the tests lists all works
    for (const auto& kind : kinds) {
        if (kind.name != name) continue;
        auto result = kind;
        result.create.size = size;
        return result;
    }
    throw std::runtime_error("no kind " + name);
}

inline std::vector<Work> make_works() {
    std::vector<Work> result;
    const Mix everything{.write = 10, .write_compressed = 1, .zero = 3, .discard = 4, .flush = 3};
    const Mix uncompressed{.write = 10, .zero = 3, .discard = 4, .flush = 3};
    const Mix reuse{.write = 10, .discard = 8, .flush = 3, .longest = 200, .window = 1000};
    const Mix resizes{.write = 10, .zero = 1, .discard = 1, .flush = 3, .resize = 3, .resized_most = 8000};

    result.push_back({"Sequential", small("v3_4k"), {.longest = 100, .sequential = true}});
    result.push_back({"SequentialLargeClusters", small("v3_64k"), {.longest = 300, .sequential = true}});
    result.push_back({"Scattered", small("v3_4k"), {.longest = 20}});
    result.push_back({"ScatteredSmallClusters", small("v3_512"), {.longest = 20}});
    result.push_back({"DiscardAndReuse", small("v3_4k"), reuse, 120});
    result.push_back({"DiscardAndReuseLargeClusters", small("v3_64k"), reuse, 120});
    result.push_back({"DiscardAndReuseV2", small("v2_4k"), reuse, 120});
    result.push_back({"Zeroes", small("v3_4k"), {.zero = 10, .flush = 3}});
    result.push_back({"OverRaw", small("over_raw_shorter_v3"), everything});
    result.push_back({"OverLongerRawV2", small("over_raw_longer_v2"), everything});
    result.push_back({"OverQcow2", small("over_qcow2_longer_v3"), everything});
    result.push_back({"OverCompressed", small("over_compressed"), everything});
    result.push_back({"Snapshot", small("snapshot_4k"), everything});
    result.push_back({"SnapshotV2", small("snapshot_64k_v2"), everything});
    const Mix snapshots{
        .write = 8, .write_compressed = 1, .zero = 2, .discard = 2, .flush = 2, .snapshot = 3, .longest = 40};
    for (const auto* kind : {"v3_4k", "snapshot_4k", "over_qcow2_longer_v3", "compressed_snapshot", "extended_snapshot",
                             "lazy_snapshot", "tiny_cache", "refcounts_64"}) {
        result.push_back({fmt::format("Snapshots_{}", kind), small(kind), snapshots, 50});
    }
    Mix emptied{.write = 10, .write_compressed = 2, .zero = 2, .flush = 2, .empty = 2};
    result.push_back({"EmptiedV2", small("over_raw_longer_v2"), emptied, 40});
    emptied.snapshot = 1;
    for (const auto* kind : {"over_qcow2_longer_v3", "extended_64k_over_qcow2", "compressed_snapshot"})
        result.push_back({fmt::format("Emptied_{}", kind), small(kind), emptied, 40});
    result.push_back({"EmptiedDataFile", small("data_file_over_raw"), {.zero = 2, .flush = 2, .empty = 2}, 40});
    result.push_back({"Compressed", small("compressed_4k"), everything});
    result.push_back({"CompressedLargeClusters", small("compressed_64k_v2"), everything});
    result.push_back({"CompressedSnapshot", small("compressed_snapshot"), everything});
    result.push_back(
        {"WritingCompressed", small("v3_4k"), {.write = 2, .write_compressed = 10, .discard = 3, .flush = 2}});
    result.push_back({"Extended", small("extended_16k"), everything});
    result.push_back({"ExtendedOverQcow2", small("extended_64k_over_qcow2"), everything});
    result.push_back({"ExtendedSnapshot", small("extended_snapshot"), everything});
    result.push_back({"ExtendedCompressed", small("extended_128k_compressed"), everything});
    result.push_back({"DataFile", small("data_file"), uncompressed});
    result.push_back({"DataFileRawExtended", small("data_file_raw_extended"), uncompressed});
    for (const auto& kind : image_kinds()) {
        if (kind.encrypted()) result.push_back({"Work_" + kind.name, small(kind.name), uncompressed, 30});
    }
    result.push_back({"Lazy", small("lazy"), everything});
    result.push_back({"LazySnapshot", small("lazy_snapshot"), everything});
    result.push_back({"NarrowRefcounts", small("refcounts_1"), everything});
    // 64 clusters of 1 KiB a refcount block: many blocks, and more than one cluster of table.
    auto wide = small("refcounts_64", std::uint64_t{8} << 20);
    wide.create.cluster_size = 512;
    result.push_back({"RefcountTableGrows", wide, {.flush = 2, .longest = 1000, .sequential = true}, 45});
    result.push_back(
        {"L1Grows", small("v3_512", 64 << 10), {.flush = 3, .resize = 4, .resized_most = 16000, .shrink = false}, 40});
    result.push_back({"Resize", small("v3_4k"), resizes});
    result.push_back({"ResizeOverLonger", small("over_qcow2_longer_v3"), resizes});
    result.push_back({"ResizeDataFile", small("data_file"), resizes});
    result.push_back({"DetectZeroes", small("detect_zeroes"), everything});
    result.push_back({"TinyCache", small("tiny_cache"), everything});
    result.push_back({"TinyCacheOverRaw", small("tiny_cache_over_raw"), everything});
    result.push_back({"Writethrough", small("writethrough"), everything});
    result.push_back({"FlushStorm", small("v3_4k"), {.write = 10, .discard = 2, .flush = 10}, 30, 4});
    result.push_back(
        {"FlushStormSnapshot", small("snapshot_4k"), {.write = 10, .zero = 2, .discard = 3, .flush = 5}, 30, 4});
    result.push_back({"ThreadsExtended", small("extended_16k"), everything, 30, 4});
    for (const auto* kind : {"v3_4k", "v2_4k", "over_qcow2_longer_v3", "snapshot_4k", "extended_16k", "data_file"}) {
        result.push_back({fmt::format("Convert_{}", kind), small(kind), uncompressed, 10, 2, true, Work::Job::convert});
    }
    for (const auto* kind : {"v3_4k", "over_compressed"}) {
        result.push_back({fmt::format("ConvertCompressed_{}", kind), small(kind), everything, 10, 2, true,
                          Work::Job::convert_compressed});
    }
    for (const auto* kind :
         {"v3_512", "snapshot_4k", "compressed_snapshot", "extended_snapshot", "data_file", "tiny_cache"}) {
        const auto& mix = small(kind).can_compress() ? everything : uncompressed;
        result.push_back({fmt::format("Full_{}", kind), small(kind), mix, 50, 1, true, Work::Job::none, true});
    }
    const Mix holes{.write = 8, .write_compressed = 2, .zero = 1, .discard = 6, .flush = 1, .longest = 100};
    for (const auto* kind : {"v3_512", "v2_4k", "snapshot_4k", "compressed_snapshot", "extended_snapshot",
                             "refcounts_1", "refcounts_64", "over_qcow2_longer_v3", "data_file"}) {
        Work work{fmt::format("Compact_{}", kind), small(kind), small(kind).can_compress() ? holes : uncompressed, 40};
        work.mix.snapshot = std::string_view(kind).contains("snapshot") ? 3 : 0;
        work.compact = true;
        work.compress = work.name == "Compact_compressed_snapshot" || work.name == "Compact_extended_snapshot";
        result.push_back(std::move(work));
    }
    for (const auto& kind : image_kinds()) {
        if (kind.name != "encrypted_4k" && kind.name != "encrypted_snapshot") continue;
        Work work{"Compact_" + kind.name, small(kind.name), uncompressed, 30};
        work.compact = true;
        result.push_back(std::move(work));
    }
    const Mix rarely_flushed{.write = 10, .zero = 2, .discard = 2, .flush = 1};
    result.push_back({"FullThreads", small("snapshot_4k"), rarely_flushed, 20, 4, true, Work::Job::none, true});
    result.push_back({"NeverFlushed", small("v3_4k"), {.discard = 2, .flush = 0}, 60, 1, false});
    return result;
}

inline std::vector<Work> works() {
    static const auto all = make_works();
    return all;
}

inline Work work_named(const std::string& name) {
    for (auto& work : works()) {
        if (work.name == name) return work;
    }
    throw std::runtime_error("no work " + name);
}

/// Overwrites the whole image with another disk.
inline Result<void> convert_into(Guest& guest, const Work& work, Random& random) {
    constexpr Value converted = 7;
    auto& image = guest.image();
    const auto contents = some_contents(image.size(), converted, random);
    std::vector<Value> values;
    for (std::uint64_t i = 0; i < guest.sectors(); ++i)
        values.push_back(value_in(i, std::span(contents).subspan(i * sector_bytes, sector_bytes)));
    const auto source = raw_disk(contents);
    CopyOptions options;
    options.workers = work.threads;
    options.sparse_bytes = image.block_size();
    return guest.change_all(values, [&] {
        return work.job == Work::Job::convert ? copy_disk(*source, image, options)
                                              : copy_compressed(*source, image, options);
    });
}

/// Compacts an image that is closed, in small pieces.
inline Result<void> compact(const Files& files, const Work& work) {
    CompactJob job;
    job.compress = work.compress;
    job.workers = 1;
    const auto& file = files.at(image_name);
    std::shared_ptr<const crypto::SectorCipher> cipher;
    if (work.kind.encrypted()) {
        auto unlocked = unlock(*file);
        if (!unlocked) return std::unexpected(unlocked.error());
        cipher = *std::move(unlocked);
    }
    auto compacted = qcow2::compact_image(file, nullptr, job, {}, 64 << 10, std::move(cipher));
    return compacted ? Result<void>() : std::unexpected(compacted.error());
}

/// All of it on an open image, up to closing it; `note` is given what each call returns.
template <class Note>
void perform(const Work& work, Guest& guest, Random& random, const Note& note) {
    if (work.job != Work::Job::none) {
        note([&] { return convert_into(guest, work, random); });
        note([&] { return guest.flush(); });
    }
    std::vector<Worker> workers;
    for (unsigned t = 0; t < work.threads; ++t)
        workers.emplace_back(guest, work.mix, Random(random.below(~std::uint64_t{0})));
    in_threads(work.threads, [&](unsigned t) {
        for (unsigned i = 0; i < work.steps; ++i) note([&] { return workers[t].step(); });
    });
}

}  // namespace qcow::test
