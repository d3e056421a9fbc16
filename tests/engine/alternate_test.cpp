// QEMU and we write the same image by turns: each finds what the other left as it should be.

#include <gtest/gtest.h>

#include "engine/image_kinds.h"
#include "engine/script.h"
#include "support/effort.h"

namespace qcow::test {
namespace {

class AlternateTest : public testing::TestWithParam<ImageKind> {
protected:
    void expect_sound(const Bytes& expected) const {
        const auto checked = qemu_check(image_name, GetParam().encrypted(), directory_.path());
        ASSERT_EQ(checked.status, 0) << checked.text();
        save({{"expected", memory_storage(expected)}}, directory_.path());
        const auto compared = qemu_compare_with_raw(image_name, GetParam().encrypted(), "expected", directory_.path());
        ASSERT_EQ(compared.status, 0) << compared.text();
        const auto image = must_open(path(), Format::qcow2);
        const auto report = value_of(image->check({}));
        ASSERT_TRUE(report.clean()) << (report.findings.empty() ? "" : report.findings[0].what);
    }

    /// A few commands in one session.
    void qemu_turn(Bytes& bytes, Random& random) const {
        std::vector<std::string> commands;
        const auto cluster = GetParam().create.cluster_size;
        const auto fill = [&](std::uint64_t at, std::uint64_t length, unsigned value) {
            std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), length, static_cast<std::byte>(value));
        };
        for (int i = 0; i < 8; ++i) {
            const auto at = random.below(bytes.size() / 512) * 512;
            const auto length = std::min<std::uint64_t>(random.between(1, 200) * 512, bytes.size() - at);
            const auto first = at / cluster * cluster;
            const auto value = static_cast<unsigned>(random.between(1, 255));
            switch (random.below(4)) {
                case 0:
                    commands.push_back(fmt::format("write -q -z {} {} {}", random.chance(50) ? "-u" : "", at, length));
                    fill(at, length, 0);
                    break;
                case 1:
                    // Only of whole clusters of version 3 it is certain what remains.
                    if (GetParam().create.version == 2 || first + cluster > bytes.size()) break;
                    commands.push_back(fmt::format("discard -q {} {}", first, cluster));
                    fill(first, cluster, 0);
                    break;
                default:
                    commands.push_back(fmt::format("write -q -P {} {} {}", value, at, length));
                    fill(at, length, value);
            }
        }
        // Written compressed is only what is not stored otherwise, and that last: QEMU goes on to fill a host cluster
        // with compressed data after that was freed and given to somebody else.
        const auto first = random.below(bytes.size() / cluster) * cluster;
        if (GetParam().can_compress() && GetParam().discards_read_as_zeros() && first + cluster <= bytes.size()) {
            commands.push_back(fmt::format("discard -q {} {}", first, cluster));
            commands.push_back(fmt::format("write -q -c -P 77 {} {}", first, cluster));
            fill(first, cluster, 77);
        }
        must_qemu_io_on_qcow2(path(), GetParam().encrypted(), commands, directory_.path());
    }

    void our_turn(Bytes& bytes, Random random) const {
        ScriptSubject subject;
        subject.open = [&] {
            auto options = GetParam().open;
            options.writable = true;
            options.format = Format::qcow2;
            options.gate = local_files();
            options.keys = [](const KeyRequest&) { return Secret(text_bytes(secret_of_tests)); };
            return value_of(open_image(value_of(open_file(path(), {.writable = true})), options));
        };
        subject.can_compress = GetParam().can_compress();
        subject.discards_read_as_zeros = GetParam().discards_read_as_zeros();
        subject.may_refuse_resize = GetParam().snapshot;
        subject.has_bitmaps = GetParam().has_bitmaps();
        Script script(subject, bytes, std::move(random));
        script.run(20);
        bytes = script.contents();
    }

    [[nodiscard]] std::string path() const { return directory_ / image_name; }

    TemporaryDirectory directory_;
};

TEST_P(AlternateTest, EachFindsWhatTheOtherLeft) {
    auto random = Random::named(GetParam().name);
    SCOPED_TRACE(replay_hint());
    auto [files, bytes, kept] = prepare(GetParam(), random);
    save(files, directory_.path());
    for (unsigned turn = 0; turn < 3 * effort(); ++turn) {
        SCOPED_TRACE(fmt::format("turn {}", turn));
        ASSERT_NO_THROW(qemu_turn(bytes, random));
        ASSERT_NO_FATAL_FAILURE(expect_sound(bytes));
        ASSERT_NO_THROW(our_turn(bytes, Random(random.below(~std::uint64_t{0}))));
        ASSERT_NO_FATAL_FAILURE(expect_sound(bytes));
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, AlternateTest, testing::ValuesIn(image_kinds()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace qcow::test
