// Power losses during work of every kind on qcow2 images: nothing is corrupt, nothing that was flushed is lost, nothing
// else than what was written appears.

#include <gtest/gtest.h>

#include "engine/crash_explorer.h"
#include "engine/image_kinds.h"
#include "engine/workload.h"
#include "qcow/copy.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

struct CrashCase {
    std::string name;
    ImageKind kind;
    Mix mix = {};
    unsigned steps = 60;
    unsigned threads = 1;
    bool close = true;  // in order; else the image is dropped with writes that were not flushed
    enum class Work : std::uint8_t { guest, convert, convert_compressed };
    Work work = Work::guest;
};

void PrintTo(const CrashCase& c, std::ostream* out) { *out << c.name; }

ImageKind kind_named(const std::string& name) {
    for (auto& kind : image_kinds()) {
        if (kind.name == name) return kind;
    }
    throw std::runtime_error("no kind " + name);
}

/// Small, so that states are made and checked quickly.
ImageKind small(const std::string& name, std::uint64_t size = std::uint64_t{1} << 20) {
    auto kind = kind_named(name);
    kind.create.size = size;
    return kind;
}

std::vector<CrashCase> crash_cases() {
    std::vector<CrashCase> result;
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
    result.push_back({"Lazy", small("lazy"), everything});
    result.push_back({"LazySnapshot", small("lazy_snapshot"), everything});
    result.push_back({"NarrowRefcounts", small("refcounts_1"), everything});
    // 64 clusters of 1 KiB a refcount block: many blocks, and more than one cluster of table.
    auto wide = small("refcounts_64", std::uint64_t{8} << 20);
    wide.create.cluster_size = 512;
    result.push_back({"RefcountTableGrows", wide, {.flush = 2, .longest = 1000, .sequential = true}});
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
        result.push_back({fmt::format("Convert_{}", kind), small(kind), {}, 0, 2, true, CrashCase::Work::convert});
    }
    for (const auto* kind : {"v3_4k", "over_compressed"}) {
        result.push_back({fmt::format("ConvertCompressed_{}", kind),
                          small(kind),
                          {},
                          0,
                          2,
                          true,
                          CrashCase::Work::convert_compressed});
    }
    result.push_back({"NeverFlushed", small("v3_4k"), {.discard = 2, .flush = 0}, 60, 1, false});
    return result;
}

/// What was done, and to which files.
struct Recorded {
    Files before;
    StorageLog log;
    std::unique_ptr<SectorModel> model;

    [[nodiscard]] History history() const { return {log, before, *model}; }
};

/// Overwrites the whole image with another disk, and notes so in the model.
void convert_into(Image& image, const CrashCase& c, Recorded& recorded, Random& random) {
    constexpr Value converted = 7;
    const auto contents = some_contents(image.size(), converted, random);
    const auto source = value_of(open_image(memory_storage(contents, "source"), {.format = Format::raw}));
    std::vector<SectorModel::Change> changes;
    for (std::uint64_t i = 0; i < image.size() / sector_bytes; ++i) {
        const auto value = value_in(i, std::span(contents).subspan(i * sector_bytes, sector_bytes));
        changes.push_back(recorded.model->begin(i, 1, value, recorded.log.mark()));
    }
    CopyOptions options;
    options.workers = c.threads;
    options.sparse_bytes = image.block_size();
    value_of(c.work == CrashCase::Work::convert ? copy_disk(*source, image, options)
                                                : copy_compressed(*source, image, options));
    const auto end = recorded.log.mark();
    for (const auto& change : changes) recorded.model->end(change, end);
}

std::unique_ptr<Recorded> record(const CrashCase& c, Random& random) {
    auto result = std::make_unique<Recorded>();
    const auto files = prepare(c.kind, random).files;
    result->before = copy_of(files);
    auto& log = result->log;
    const auto sectors = c.kind.create.size / sector_bytes;
    result->model = std::make_unique<SectorModel>(sectors, c.mix.resized_most);
    Files recorded;
    for (const auto& [name, storage] : files) recorded[name] = std::make_shared<RecordingStorage>(storage, name, log);
    const auto image = value_of(open_kind(c.kind, recorded, true));
    Guest guest(*image, *result->model, [&] { return log.mark(); }, c.kind.discards_read_as_zeros());
    guest.adopt();
    if (c.kind.open.write.cache == CacheMode::writethrough) guest.expect_writethrough();
    if (c.work != CrashCase::Work::guest) convert_into(*image, c, *result, random);
    std::vector<Worker> workers;
    for (unsigned t = 0; t < c.threads; ++t)
        workers.emplace_back(guest, c.mix, Random(random.below(~std::uint64_t{0})));
    in_threads(c.threads, [&](unsigned t) {
        for (unsigned i = 0; i < c.steps; ++i) value_of(workers[t].step());
    });
    if (auto wrong = guest.verify(0, guest.sectors())) throw std::runtime_error(*wrong);
    if (c.close) value_of(guest.close());
    return result;
}

Opener opener(const ImageKind& kind) {
    return [kind](const Files& files, bool writable) { return open_kind(kind, files, writable); };
}

class CrashTest : public testing::TestWithParam<CrashCase> {};

TEST_P(CrashTest, LosesNothing) {
    const auto& c = GetParam();
    unsigned states = 0;
    unsigned qemu_checks = 0;
    for (unsigned round = 0; round < effort(); ++round) {
        auto random = Random::named(fmt::format("{}/{}", c.name, round));
        const auto recorded = record(c, random);
        const auto report =
            CrashExplorer(recorded->history(), opener(c.kind), random).explore({.states = 260, .qemu_checks = 4});
        states += report.states;
        qemu_checks += report.qemu_checks;
        ASSERT_FALSE(report.violation) << "round " << round << ": " << *report.violation << "\n" << replay_hint();
    }
    RecordProperty("states", static_cast<int>(states));
    std::cout << "covered " << states << " states after power loss\ncovered " << qemu_checks
              << " of these by QEMU's check, too\n";
}

INSTANTIATE_TEST_SUITE_P(Work, CrashTest, testing::ValuesIn(crash_cases()),
                         [](const auto& test) { return test.param.name; });

/// The engine as it would be if it left out flushes: what its log says is then believed less than it says.
class BrokenEngineTest : public testing::Test {
protected:
    /// Whether it shows that those flushes are missing, given by the events in which they end.
    static bool caught(const std::function<bool(const History&, std::size_t end)>& left_out) {
        for (const auto* name : {"DiscardAndReuse", "Snapshot", "RefcountTableGrows"}) {
            const auto cases = crash_cases();
            const auto c = *std::ranges::find(cases, name, &CrashCase::name);
            Random random(1);  // what is found must not be luck
            const auto recorded = record(c, random);
            const auto history = recorded->history();
            const auto broken = history.log.without_flushes([&](std::size_t end) { return left_out(history, end); });
            const CrashOptions options{.states = 400};
            if (CrashExplorer({broken, history.before, history.model}, opener(c.kind), random)
                    .explore(options)
                    .violation)
                return true;
        }
        return false;
    }
};

TEST_F(BrokenEngineTest, FlushesThatDoNothingAreFound) {
    EXPECT_TRUE(caught([](const History&, std::size_t) { return true; }));
}

/// The flushes that the guest did not ask for, which keep refcounts, tables and data in order.
TEST_F(BrokenEngineTest, MetadataWithoutOrderAreFound) {
    EXPECT_TRUE(caught([](const History& history, std::size_t end) { return !history.model.flushing_at(end); }));
}

TEST_F(BrokenEngineTest, OneFlushInThreeMissingIsFound) {
    unsigned n = 0;
    EXPECT_TRUE(caught([&](const History&, std::size_t) { return ++n % 3 == 0; }));
}

}  // namespace
}  // namespace qcow::test
