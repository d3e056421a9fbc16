// A dry run of compact says what the job then does, to the byte.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/bits.h"
#include "qcow/bitmaps.h"
#include "qcow/compact.h"
#include "qcow/create.h"
#include "qcow2/compaction.h"
#include "support/effort.h"
#include "support/memory_files.h"
#include "support/random.h"
#include "support/result.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t unit = 4 * KiB;  // of what is written

CreateOptions options_to_compact(Random& random) {
    CreateOptions options;
    options.size = random.between(1, 400) * unit;
    options.extended_l2 = random.chance(15);
    options.cluster_size = options.extended_l2 ? 16 * KiB : random.pick({512U, 512U, 1024U, 4096U});
    options.version = options.extended_l2 || random.chance(85) ? 3 : 2;
    options.refcount_bits = options.version == 2 ? 16 : random.pick({16U, 16U, 32U, 64U});
    if (options.version == 3 && random.chance(30)) options.compression = Compression::zstd;
    return options;
}

void change_disk(Image& image, Random& random) {
    const auto block = std::max<std::uint64_t>(unit, image.block_size());
    const std::uint64_t at = random.below(divide_up(image.size(), block)) * block;
    const auto length = std::min(image.size() - at, random.pick({1, 1, 3, 16, 60}) * block);
    auto bytes = random.bytes(length);
    const bool compressible = random.chance(40);
    if (compressible) std::ranges::fill(std::span(bytes).last(length - length / random.between(2, 8)), 'q');
    const auto data = std::as_bytes(std::span(bytes));
    const auto dice = random.below(10);
    if (dice < 5) value_of(image.write({at}, data));
    if (dice == 5) value_of(image.write({at}, Bytes(length)));
    if (dice == 6) value_of(image.write_compressed({at}, data));
    if (dice == 7) value_of(image.write_zeroes({at}, length));
    if (dice > 7) value_of(image.discard({at}, length));
}

/// An image with holes in its file: of the disk, of snapshots that are gone, of bitmaps.
std::shared_ptr<Storage> image_to_compact(Random& random) {
    const auto options = options_to_compact(random);
    auto file = memory_storage({}, image_name);
    value_of(create_image({file, nullptr}, options));
    const auto image = value_of(open_image(file, {.writable = true, .format = Format::qcow2}));
    std::vector<std::string> snapshots;
    const auto steps = random.between(1, 40);
    for (std::uint64_t step = 0; step < steps; ++step) {
        const auto dice = random.below(20);
        if (dice == 0 && snapshots.size() < 4) {
            snapshots.push_back(value_of(image->snapshots().create(fmt::format("s{}", step))).id);
        } else if (dice == 1 && !snapshots.empty()) {
            value_of(image->snapshots().apply(random.pick(snapshots)));
        } else if (dice == 2 && !snapshots.empty()) {
            const auto gone = random.pick(snapshots);
            value_of(image->snapshots().remove(gone));
            std::erase(snapshots, gone);
        } else if (dice == 3 && options.version == 3) {
            const BitmapAction add{.bitmap = fmt::format("b{}", step), .granularity = random.pick({512U, 4096U})};
            value_of(image->change_bitmaps({&add, 1}));
        } else {
            change_disk(*image, random);
        }
    }
    value_of(image->close());
    return file;
}

std::string described(const CompactResult& result) {
    return fmt::format("{} to {} bytes, {} leaked, {} unmapped, {} compressed, {} and {} moved, {}", result.size_before,
                       result.size_after, result.leaked_clusters, result.unmapped_clusters, result.compressed_clusters,
                       result.moved_clusters, result.moved_streams, result.changed ? "changed" : "the same");
}

TEST(CompactPlanTest, TheJobDoesWhatADryRunSays) {
    unsigned changed = 0;
    const unsigned images = rounds(150);
    for (unsigned round = 0; round < images; ++round) {
        auto random = Random::named(fmt::format("compact plan {}", round));
        SCOPED_TRACE(fmt::format("round {}, {}", round, replay_hint()));
        const auto file = image_to_compact(random);
        const auto before = contents_of(*file);
        CompactJob job;
        job.zeroes = random.chance(50);
        job.compress = random.chance(50);
        job.workers = random.pick({1U, 4U});
        const auto batch_bytes = random.pick({32 * MiB, 64 * KiB, 16 * KiB});
        const auto run = [&] { return described(value_of(qcow2::compact_image(file, nullptr, job, {}, batch_bytes))); };
        job.dry_run = true;
        const auto planned = run();
        ASSERT_TRUE(contents_of(*file) == before) << "a dry run";
        job.dry_run = false;
        EXPECT_EQ(run(), planned) << (job.zeroes ? "--zeroes " : "") << (job.compress ? "--compress " : "")
                                  << "workers " << job.workers << ", batches of " << batch_bytes;
        if (HasFailure()) return;
        changed += contents_of(*file) != before ? 1 : 0;
        // What a second run would do is nothing.
        job.dry_run = true;
        EXPECT_FALSE(value_of(qcow2::compact_image(file, nullptr, job, {}, batch_bytes)).changed);
    }
    EXPECT_GT(changed, images / 2);
}

}  // namespace
}  // namespace qcow::test
