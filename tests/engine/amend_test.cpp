// Power losses while the options of an image change: it is sound, and holds what it held.

#include "qcow2/amend.h"

#include <gtest/gtest.h>

#include "engine/crash_explorer.h"
#include "engine/works.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

struct Case {
    const char* name;
    const char* kind;
    AmendOptions options;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class AmendCrashTest : public testing::TestWithParam<Case> {};

TEST_P(AmendCrashTest, LosesNothing) {
    const auto& c = GetParam();
    const auto kind = small(c.kind);
    auto random = Random::named(c.name);
    const auto prepared = prepare(kind, random);
    const auto before = copy_of(prepared.files);
    SectorModel model(kind.create.size / sector_bytes);
    adopt(*value_of(open_kind(kind, before, false)), model);
    StorageLog log;
    const auto recorded = std::make_shared<RecordingStorage>(prepared.files.at(image_name), image_name, log);
    value_of(qcow2::amend_header(recorded, c.options, {}));
    ASSERT_GT(log.events().size(), 2U);
    History history{log, before, model, prepared.kept};
    const auto opener = [&](const Files& files, bool writable) { return open_kind(kind, files, writable); };
    const auto options = sanitized ? CrashOptions{.samples = 30, .most = 30} : CrashOptions{.qemu_checks = 4};
    const auto report = CrashExplorer(history, opener, random).explore(options);
    ASSERT_FALSE(report.violation) << *report.violation << "\n" << replay_hint();
    std::cout << "covered " << report.states << " states after power loss\n";
}

INSTANTIATE_TEST_SUITE_P(Options, AmendCrashTest,
                         testing::Values(Case{"WiderRefcounts", "snapshot_4k", {.refcount_bits = 64}},
                                         Case{"NarrowerRefcounts", "compressed_4k", {.refcount_bits = 8}},
                                         Case{"SmallClusters", "v3_512", {.refcount_bits = 32, .lazy_refcounts = true}},
                                         Case{"Version3", "v2_4k", {.version = 3}},
                                         Case{"Version3AndRefcounts",
                                              "snapshot_64k_v2",
                                              {.version = 3, .refcount_bits = 4, .lazy_refcounts = true}},
                                         Case{"Version2", "compressed_4k", {.version = 2}}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace qcow::test
