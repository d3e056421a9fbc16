#include "format/header_edit.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/endian.h"
#include "support/effort.h"
#include "support/qcow2_header.h"
#include "support/random.h"
#include "support/result.h"

namespace qcow::format {
namespace {

using namespace qcow::test;
using testing::HasSubstr;

using Steps = std::vector<Bytes>;

/// Everything that parse_header understands of a header, but its length.
std::string understood(const Bytes& cluster) {
    const auto header = parse_header(cluster);
    if (!header) return header.error().message();
    std::vector<std::uint32_t> unknown;
    for (const auto& extension : header->unknown_extensions) unknown.push_back(extension.type);
    return fmt::format("{} {} {} \"{}\" {} {} {:x} features {} directory {:x} l1 {:x}", header->version,
                       header->refcount_order, header->size, header->backing_name, header->backing_format.value_or("-"),
                       header->data_file_name.value_or("-"), fmt::join(unknown, ","), header->feature_names.size(),
                       header->bitmaps ? header->bitmaps->directory.value : 0, header->l1_table.value);
}

/// A version 3 header with these extensions and, behind them, a name.
Bytes header_with(const std::vector<Bytes>& extensions, std::string_view name = {}) {
    Bytes tail;
    for (const auto& extension : extensions) tail.insert(tail.end(), extension.begin(), extension.end());
    tail.resize(tail.size() + 8);
    auto header = with(header_v3(), extensions_v3, tail);
    if (name.empty()) return header;
    const auto at = extensions_v3 + tail.size();
    header = with_u32(with_u64(header, field::backing_file_offset, at), field::backing_file_size,
                      static_cast<std::uint32_t>(name.size()));
    return with(header, at, text_bytes(name));
}

const Bytes unknown_1 = extension(0x12345678, text_bytes("nobody knows"));
const Bytes unknown_2 = extension(0x23456789, repeated(300, 7));
const Bytes raw_format = extension(0xe2792aca, text_bytes("raw"));

Bytes feature_table() {
    Bytes names;
    for (std::uint8_t i = 0; i < 8; ++i) names = joined({names, feature_name(0, i, "a feature")});
    return extension(0x6803f857, names);
}

/// What the cluster holds after the last step.
Bytes after(const Bytes& cluster, const Steps& steps) {
    return steps.empty() ? cluster : with(cluster, 0, steps.back());
}

TEST(HeaderEdit, ChangesNothingWhereNothingChanges) {
    for (const auto& cluster : {header_v2(), header_v3(), header_with({unknown_1, raw_format, unknown_2}, "base.raw"),
                                first(header_v3(), 112)}) {
        EXPECT_TRUE(must(HeaderEdit(cluster).steps()).empty());
        HeaderEdit edit(cluster);
        edit.set_state(must(parse_header(cluster)));
        edit.set_backing_name(must(parse_header(cluster)).backing_name);
        EXPECT_TRUE(must(edit.steps()).empty());
    }
}

TEST(HeaderEdit, KeepsExtensionsTheirOrderAndTheirPadding) {
    auto padded = raw_format;
    padded.back() = std::byte{0xee};
    const auto cluster = header_with({unknown_1, padded, unknown_2}, "base.raw");
    HeaderEdit edit(cluster);
    edit.set_backing_name("another.qcow2");
    const auto renamed = after(cluster, must(edit.steps()));
    EXPECT_EQ(renamed, header_with({unknown_1, padded, unknown_2}, "another.qcow2"));
    edit.set_extension(ExtensionType::backing_format, text_bytes("qcow2"));
    const auto changed = after(cluster, must(edit.steps()));
    EXPECT_EQ(changed,
              header_with({unknown_1, extension(0xe2792aca, text_bytes("qcow2")), unknown_2}, "another.qcow2"));
}

TEST(HeaderEdit, KeepsFieldsThatNobodyKnows) {
    auto cluster = with_u32(header_v3(), field::header_length, 128);
    cluster = with(cluster, 112, repeated(16, 0x5a));
    cluster = with(cluster, 128, joined({unknown_1, Bytes(8)}));
    HeaderEdit edit(cluster);
    edit.set_extension(ExtensionType::backing_format, text_bytes("raw"));
    edit.set_backing_name("base.raw");
    const auto changed = after(cluster, must(edit.steps()));
    EXPECT_EQ(load_be<std::uint32_t>(changed, field::header_length), 128U);
    EXPECT_EQ(Bytes(changed.begin() + 112, changed.begin() + 128), repeated(16, 0x5a));
    EXPECT_EQ(Bytes(changed.begin() + 128, changed.begin() + 128 + static_cast<std::ptrdiff_t>(unknown_1.size())),
              unknown_1);
    EXPECT_EQ(must(parse_header(changed)).backing_format, "raw");
}

TEST(HeaderEdit, RemovesAndAdds) {
    const auto cluster = header_with({raw_format, unknown_1, extension(0xe2792aca, text_bytes("vmdk"))}, "base.raw");
    HeaderEdit removed(cluster);
    removed.remove_extension(ExtensionType::backing_format);
    removed.set_backing_name("");
    EXPECT_EQ(after(cluster, must(removed.steps())), header_with({unknown_1}));
    HeaderEdit set(cluster);
    set.set_extension(ExtensionType::backing_format, text_bytes("qcow2"));
    EXPECT_EQ(after(cluster, must(set.steps())),
              header_with({extension(0xe2792aca, text_bytes("qcow2")), unknown_1}, "base.raw"));
    HeaderEdit added(header_with({unknown_1}));
    added.set_extension(ExtensionType::backing_format, text_bytes("raw"));
    added.set_backing_name("b");
    EXPECT_EQ(after(header_with({unknown_1}), must(added.steps())), header_with({unknown_1, raw_format}, "b"));
}

TEST(HeaderEdit, RefusesWhatDoesNotFit) {
    auto cluster = first(with_u32(header_v3(), field::cluster_bits, 9), 512);
    cluster = with_u64(cluster, field::size, 4096);
    HeaderEdit edit(cluster);
    edit.set_backing_name(std::string(512 - 112 - 8, 'n'));
    EXPECT_EQ(must(edit.steps()).size(), 1U);
    edit.set_backing_name(std::string(512 - 112 - 7, 'n'));
    EXPECT_TRUE(fails(edit.steps(), Errc::limit_exceeded, {"513 bytes", "cluster of 512"}));
    HeaderEdit long_name(header_v3());
    long_name.set_backing_name(std::string(1024, 'n'));
    EXPECT_TRUE(fails(long_name.steps(), Errc::limit_exceeded));
}

TEST(HeaderEdit, FeatureNamesGiveWay) {
    const auto feature_names = extension(0x6803f857, Bytes(96));
    auto cluster = header_with({feature_names, unknown_1});
    cluster = with_u32(first(cluster, 512), field::cluster_bits, 9);
    cluster = with_u64(cluster, field::size, 4096);
    const auto changed_name = [&](std::size_t length) {
        HeaderEdit edit(cluster);
        edit.set_backing_name(std::string(length, 'n'));
        return after(cluster, must(edit.steps()));
    };
    const std::size_t room = 512 - 112 - feature_names.size() - unknown_1.size() - 8;
    EXPECT_EQ(must(parse_header(changed_name(room))).feature_names.size(), 2U);
    const auto without = must(parse_header(changed_name(room + 1)));
    EXPECT_EQ(without.feature_names.size(), 0U);
    EXPECT_EQ(without.unknown_extensions.size(), 1U);
    EXPECT_EQ(without.backing_name.size(), room + 1);
}

TEST(HeaderEdit, OneSectorChangesInOneStep) {
    const auto cluster = header_with({raw_format}, "base.raw");
    HeaderEdit edit(cluster);
    edit.set_backing_name("another.raw");
    EXPECT_EQ(must(edit.steps()).size(), 1U);
}

/// Makes the steps. Whatever sectors of a step are on disk, and whatever it is: the old header, or the new one.
Bytes expect_old_or_new(const Bytes& cluster, const Steps& steps, Random& random) {
    const auto old_header = understood(cluster);
    const auto new_header = understood(after(cluster, steps));
    EXPECT_THAT(new_header, testing::Not(HasSubstr("header"))) << new_header;
    auto on_disk = cluster;
    bool is_new = false;
    for (const auto& step : steps) {
        EXPECT_EQ(step.size() % 512, 0U);
        for (unsigned subset = 0; subset < 20; ++subset) {
            auto torn = on_disk;
            for (std::size_t at = 0; at < step.size(); at += 512) {
                if (random.chance(50))
                    std::copy_n(step.begin() + static_cast<std::ptrdiff_t>(at), 512,
                                torn.begin() + static_cast<std::ptrdiff_t>(at));
            }
            const auto found = understood(torn);
            if (steps.size() == 1) continue;
            EXPECT_TRUE(found == new_header || (found == old_header && !is_new))
                << found << "\nold " << old_header << "\nnew " << new_header << "\n"
                << replay_hint();
        }
        on_disk = with(on_disk, 0, step);
        is_new = is_new || understood(on_disk) == new_header;
    }
    EXPECT_EQ(understood(on_disk), new_header);
    return on_disk;
}

TEST(HeaderEdit, VersionsChange) {
    auto random = Random::named("header-version");
    for (unsigned round = 0; round < 100; ++round) {
        // A version 2 header with extensions, and a name behind them.
        auto tail =
            joined({random.chance(50) ? raw_format : Bytes(), random.chance(50) ? unknown_2 : Bytes(), Bytes(8)});
        const std::string name(random.below(900), 'a');
        auto cluster = with(header_v2(), fixed_header_v2, joined({tail, text_bytes(name)}));
        if (!name.empty()) {
            cluster = with_u32(with_u64(cluster, field::backing_file_offset, fixed_header_v2 + tail.size()),
                               field::backing_file_size, static_cast<std::uint32_t>(name.size()));
        }
        const auto old = must(parse_header(cluster));
        HeaderEdit newer(cluster);
        newer.set_version(3);
        const auto version3 = expect_old_or_new(cluster, must(newer.steps()), random);
        auto header = must(parse_header(version3));
        EXPECT_EQ(header.version, 3U);
        EXPECT_EQ(header.header_length, 112U);
        EXPECT_EQ(header.refcount_order, 4U);
        EXPECT_EQ(header.backing_name, name);
        EXPECT_EQ(header.unknown_extensions.size(), old.unknown_extensions.size());
        HeaderEdit other(version3);
        header.incompatible |= incompatible::compression_type;
        other.set_state(header);
        other.set_compression(Compression::zstd);
        other.set_refcount_order(2);
        const auto changed = must(parse_header(expect_old_or_new(version3, must(other.steps()), random)));
        EXPECT_EQ(changed.compression, Compression::zstd);
        EXPECT_EQ(changed.refcount_order, 2U);
        HeaderEdit older(version3);
        older.set_version(2);
        EXPECT_EQ(after(version3, must(older.steps())), cluster);
    }
}

TEST(HeaderEdit, ACrashLeavesTheOldHeaderOrTheNewOne) {
    auto random = Random::named("header-edit");
    unsigned many_steps = 0;
    for (unsigned round = 0; round < 300 * effort(); ++round) {
        std::vector<Bytes> extensions;
        for (const auto& candidate : {feature_table(), raw_format, unknown_1, unknown_2})
            if (random.chance(60))
                extensions.insert(extensions.begin() + static_cast<std::ptrdiff_t>(random.below(extensions.size() + 1)),
                                  candidate);
        const auto cluster =
            header_with(extensions, random.chance(50) ? std::string(random.between(1, 1000), 'a') : std::string());
        HeaderEdit edit(cluster);
        auto state = must(parse_header(cluster));
        state.size = (state.size >> random.below(3));
        edit.set_state(state);
        if (random.chance(80)) edit.set_backing_name(std::string(random.below(1000), 'b'));
        if (random.chance(50)) edit.set_extension(ExtensionType::backing_format, text_bytes("qcow2"));
        if (random.chance(30)) edit.remove_extension(ExtensionType::feature_names);
        if (random.chance(30))
            edit.set_extension(ExtensionType::bitmaps, joined({u32(1), u32(0), u64(100), u64(1 << 20)}));
        if (random.chance(30)) edit.set_refcount_order(5);
        const auto steps = must(edit.steps());
        many_steps += steps.size() > 1 ? 1 : 0;
        const auto on_disk = expect_old_or_new(cluster, steps, random);
        // Nothing is left of what was only there for a while.
        auto again = HeaderEdit(on_disk);
        again.set_backing_name(must(parse_header(on_disk)).backing_name);
        EXPECT_TRUE(must(again.steps()).empty());
    }
    EXPECT_GT(many_steps, 100U);
}

TEST(HeaderEdit, OldHeadersChangeInOneStep) {
    HeaderEdit version2(header_v2());
    version2.set_extension(ExtensionType::backing_format, text_bytes("raw"));
    version2.set_backing_name(std::string(900, 'n'));
    const auto steps = must(version2.steps());
    ASSERT_EQ(steps.size(), 1U);
    EXPECT_EQ(must(parse_header(after(header_v2(), steps))).backing_name, std::string(900, 'n'));
}

}  // namespace
}  // namespace qcow::format
