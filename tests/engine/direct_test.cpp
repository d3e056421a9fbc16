// Random scripts on qcow2 images whose files are written past the system's cache.

#include <gtest/gtest.h>

#include "engine/script.h"
#include "qcow/create.h"
#include "support/effort.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

class DirectScript : public testing::TestWithParam<std::uint64_t> {};

TEST_P(DirectScript, DoesWhatAnArrayDoes) {
    const TemporaryDirectory directory(on_a_disk);
    const auto image = directory / "disk.qcow2";
    for (unsigned i = 0; i < 2 * effort(); ++i) {
        CreateOptions create;
        create.size = (std::uint64_t{2} << 20) + 512;
        create.cluster_size = GetParam();
        write_file(image, "");
        auto file = open_file(image, {.writable = true, .direct = true});
        if (!file && file.error().code == Errc::unsupported) GTEST_SKIP() << file.error().message();
        value_of(create_image({value_of(std::move(file)), nullptr}, create));

        ScriptSubject subject;
        subject.can_compress = true;
        subject.open = [&] {
            OpenOptions options;
            options.writable = true;
            return value_of(open_image(value_of(open_file(image, {.writable = true, .direct = true})), options));
        };
        Script script(subject, Bytes(create.size), Random::named(fmt::format("direct{}/{}", GetParam(), i)));
        script.run(40);

        const auto& contents = script.contents();
        write_file(directory / "expected", {reinterpret_cast<const char*>(contents.data()), contents.size()});
        must_qemu_img({"check", "-q", "-f", "qcow2", image});
        const auto compared = qemu_img({"compare", "-f", "qcow2", "-F", "raw", image, directory / "expected"});
        EXPECT_EQ(compared.status, 0) << compared.text() << replay_hint();
    }
}

INSTANTIATE_TEST_SUITE_P(ClusterSizes, DirectScript, testing::Values(512, 4096, 65536));

}  // namespace
}  // namespace qcow::test
