// Power losses and faults while images are committed and rebased: the disk holds what it held, and the job can be run
// again.

#include <gtest/gtest.h>

#include "base/try.h"
#include "disk/layer.h"
#include "engine/crash_explorer.h"
#include "engine/works.h"
#include "operation/commit.h"
#include "operation/rebase.h"
#include "support/effort.h"
#include "support/faulty.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t chain_bytes = 160 << 10;

struct ChainCase {
    const char* name;
    CreateOptions top;
    CreateOptions base;
    bool raw_base = false;
    bool keep = false;               // of a commit
    const char* new_base = nullptr;  // of a rebase; "": none
    bool compress = false;
};

void PrintTo(const ChainCase& c, std::ostream* out) { *out << c.name; }

CreateOptions layer_options(std::uint64_t cluster_size, unsigned version = 3, bool extended_l2 = false) {
    CreateOptions options;
    options.cluster_size = cluster_size;
    options.version = version;
    options.extended_l2 = extended_l2;
    return options;
}

/// The image over "middle" over "base", and "other" with contents of its own.
class ChainTest : public testing::TestWithParam<ChainCase> {
protected:
    const ChainCase& c = GetParam();

    static std::shared_ptr<Image> open_file(const Files& files, const std::string& name, Format format, bool writable,
                                            bool alone) {
        OpenOptions options;
        options.writable = writable;
        options.format = format;
        options.gate = gate_to(files);
        options.write.cache = CacheMode::writeback;
        if (alone) options.backing = nullptr;
        options.warn = [](const std::string&) {};
        return value_of(open_image(files.at(name), options));
    }

    [[nodiscard]] Format base_format() const { return c.raw_base ? Format::raw : Format::qcow2; }

    [[nodiscard]] Files make(Random& random) const {
        Files files;
        const auto add = [&](const std::string& name, CreateOptions options, std::uint64_t size,
                             const std::string& backing, Value value) {
            files[name] = memory_storage({}, name);
            if (name == "base" && c.raw_base) {
                value_of(files[name]->write({0}, some_contents(size, value, random)));
                return;
            }
            options.size = size;
            options.backing_name = backing;
            if (!backing.empty())
                options.backing_format = format_name(backing == "base" ? base_format() : Format::qcow2);
            value_of(create_image({files[name], nullptr}, options));
            const auto image = open_file(files, name, Format::qcow2, true, false);
            for (std::uint64_t at = 0; at < size; at += 8 << 10) {
                const auto bytes = some_contents(std::min<std::uint64_t>(8 << 10, size - at), value, random);
                const auto dice = random.below(6);
                if (dice < 2) value_of(image->write({at}, bytes));
                if (dice == 2 && at % image->block_size() == 0 && bytes.size() % image->block_size() == 0)
                    value_of(image->write_compressed({at}, bytes));
                if (dice == 3) value_of(image->write_zeroes({at}, bytes.size()));
            }
            value_of(image->close());
        };
        add("base", c.base, chain_bytes / 2, "", 11);
        add("middle", layer_options(4096), chain_bytes * 3 / 4, "base", 12);
        add(image_name, c.top, chain_bytes, "middle", 13);
        add("other", layer_options(8192), chain_bytes, "", 14);
        return files;
    }

    [[nodiscard]] static Bytes contents(const Files& files) {
        const auto image = open_file(files, image_name, Format::qcow2, false, false);
        Bytes bytes(image->size());
        value_of(image->read({0}, bytes));
        return bytes;
    }

    /// The whole job, as the functions of the library do it with files.
    [[nodiscard]] Result<void> perform(const Files& files) const {
        try {
            const auto top = open_file(files, image_name, Format::qcow2, c.new_base != nullptr || !c.keep, false);
            const auto done = c.new_base != nullptr ? rebase(files, *top) : commit(files, *top);
            return done ? Result<void>() : std::unexpected(done.error());
        } catch (const std::exception& e) {  // value_of
            return fail(Errc::io, "", e.what());
        }
    }

    [[nodiscard]] Result<std::uint64_t> rebase(const Files& files, Image& top) const {
        std::shared_ptr<Image> other;
        if (*c.new_base != '\0') other = open_file(files, c.new_base, Format::qcow2, false, false);
        RebaseJob job;
        job.workers = 1;
        job.compress = c.compress;
        const auto format = other ? std::optional(Format::qcow2) : std::nullopt;
        return rebase_image(top, {other.get(), c.new_base, format}, job, {});
    }

    /// Of all that is above the base.
    [[nodiscard]] Result<std::uint64_t> commit(const Files& files, Image& top) const {
        std::size_t layers = 1;
        auto lowest = std::dynamic_pointer_cast<Layer>(top.backing());
        const auto name = [&] { return value_of(top.info()).backing->name; };
        if (name() == "middle") {
            ++layers;
            lowest->exchange_backing(nullptr);
        } else {
            dynamic_cast<Layer&>(top).exchange_backing(nullptr);
        }
        lowest.reset();
        const auto base = open_file(files, "base", base_format(), true, true);
        CommitJob job;
        job.workers = 1;
        job.keep = c.keep;
        const auto new_name = layers > 1 && !c.keep ? std::optional<std::string>("base") : std::nullopt;
        return commit_layers({top, layers, *base, new_name}, job, {});
    }

    /// Also fails if the base is not sound.
    [[nodiscard]] Opener opener() const {
        return [this](const Files& files, bool writable) -> Result<std::shared_ptr<Image>> {
            if (!c.raw_base) {
                const auto base = open_file(files, "base", Format::qcow2, false, true);
                const auto report = TRY(base->check({.workers = 1}));
                if (report.corruptions + report.errors != 0)
                    return fail(Errc::corrupt, report.findings.front().place, report.findings.front().what);
            }
            OpenOptions options;
            options.writable = writable;
            options.format = Format::qcow2;
            options.gate = gate_to(files);
            return open_image(files.at(image_name), options);
        };
    }
};

TEST_P(ChainTest, PowerLossLosesNothing) {
    auto random = Random::named(c.name);
    const auto before = make(random);
    const auto expected = contents(before);
    SectorModel model(chain_bytes / sector_bytes);
    adopt(*value_of(opener()(before, false)), model);

    StorageLog log;
    const auto after = copy_of(before);
    Files recorded;
    for (const auto& [name, storage] : after) recorded[name] = std::make_shared<RecordingStorage>(storage, name, log);
    value_of(perform(recorded));
    ASSERT_TRUE(contents(after) == expected);
    ASSERT_GT(log.events().size(), 10U);

    History history{log, before, model};
    history.discards_read_as_zeros = c.top.version == 3;
    const auto options = sanitized ? CrashOptions{.samples = 30, .most = 30} : CrashOptions{};
    const auto report = CrashExplorer(history, opener(), random).explore(options);
    ASSERT_FALSE(report.violation) << *report.violation << "\n" << replay_hint();

    CrashStates states(log, before);
    for (std::size_t now = 1; now < log.events().size(); now += 1 + log.events().size() / (sanitized ? 8 : 40)) {
        states.advance(now);
        const auto crashed = states.build([&](std::size_t, std::uint64_t) { return random.chance(50); });
        const auto again = perform(crashed);
        ASSERT_TRUE(again) << "run again: " << again.error().message();
        ASSERT_TRUE(contents(crashed) == expected) << "run again after event " << now;
    }
    std::cout << "covered " << report.states << " states after power loss\n";
}

TEST_P(ChainTest, FaultsLoseNothing) {
    auto random = Random::named(c.name);
    const auto before = make(random);
    const auto expected = contents(before);
    using Operation = Faults::Operation;
    unsigned met = 0;
    for (const auto operation : {Operation::read, Operation::write, Operation::space, Operation::flush}) {
        for (const auto code : {Errc::io, Errc::no_space}) {
            for (std::uint64_t i = 0, step = sanitized ? 3 : 1; i < 400; i += step, step += i / 4) {
                const auto files = copy_of(before);
                const auto faults = std::make_shared<Faults>();
                Files faulty;
                for (const auto& [name, storage] : files)
                    faulty[name] = std::make_shared<FaultyStorage>(storage, faults);
                faults->arm({.operation = operation, .after = i, .times = 1, .code = code, .percent_done = 40});
                const auto done = perform(faulty);
                if (faults->hits() == 0) break;
                ++met;
                SCOPED_TRACE(fmt::format("operation {} of kind {}, code {}: {}", i, static_cast<int>(operation),
                                         static_cast<int>(code), done ? "done" : done.error().message()));
                ASSERT_TRUE(contents(files) == expected);
                ASSERT_TRUE(opener()(files, true).has_value());
                value_of(perform(files));
                ASSERT_TRUE(contents(files) == expected) << "run again";
            }
        }
    }
    ASSERT_GT(met, 20U);
}

INSTANTIATE_TEST_SUITE_P(
    Jobs, ChainTest,
    testing::Values(ChainCase{"Commit", layer_options(4096), layer_options(4096)},
                    ChainCase{"CommitSmallClusters", layer_options(512), layer_options(65536)},
                    ChainCase{"CommitVersion2", layer_options(4096, 2), layer_options(4096, 2)},
                    ChainCase{"CommitExtended", layer_options(16384, 3, true), layer_options(16384, 3, true)},
                    ChainCase{"CommitRaw", layer_options(4096), layer_options(4096), true},
                    ChainCase{"CommitKept", layer_options(4096), layer_options(4096), false, true},
                    ChainCase{"RebaseToAnother", layer_options(4096), layer_options(4096), false, false, "other"},
                    ChainCase{"RebaseToNone", layer_options(16384, 3, true), layer_options(4096), false, false, ""},
                    ChainCase{"RebaseVersion2", layer_options(4096, 2), layer_options(4096), true, false, "other"},
                    ChainCase{"RebaseCompressed", layer_options(4096), layer_options(4096), false, false, "other",
                              true}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace qcow::test
