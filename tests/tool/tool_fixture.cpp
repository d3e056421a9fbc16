#include "tool/tool_fixture.h"

namespace qcow::test {

void ToolTest::SetUp() {
    must_qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "4M"}, directory_.path());
    must_qemu_io("base.qcow2", "qcow2", {"write -q -P 65 0 100k", "write -q -c -P 66 1M 64k"}, directory_.path());
    must_qemu_img({"snapshot", "-c", "before", "base.qcow2"}, directory_.path());
    must_qemu_io("base.qcow2", "qcow2", {"write -q -P 67 0 64k"}, directory_.path());
    must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"}, directory_.path());
    must_qemu_io("top.qcow2", "qcow2", {"write -q -P 68 2M 64k"}, directory_.path());
}

Finished ToolTest::tool(Arguments arguments) const {
    arguments.insert(arguments.begin(), QCOW_TOOL);
    return run(arguments, directory_.path());
}

Finished ToolTest::must_tool(const Arguments& arguments) const {
    auto finished = tool(arguments);
    EXPECT_EQ(finished.status, 0) << finished.text();
    EXPECT_EQ(finished.err, "") << finished.text();
    return finished;
}

void ToolTest::expect_refusal(const Arguments& arguments, const testing::Matcher<std::string>& message) const {
    const auto finished = tool(arguments);
    EXPECT_EQ(finished.status, 1) << finished.text();
    EXPECT_EQ(finished.out, "") << finished.text();
    EXPECT_THAT(finished.err, testing::AllOf(testing::StartsWith("qcow: "), message)) << finished.text();
    EXPECT_EQ(std::ranges::count(finished.err, '\n'), 1) << finished.text();
}

std::set<std::string> ToolTest::files() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(directory_.path()))
        names.insert(entry.path().filename().string());
    return names;
}

void ToolTest::corrupt_l2_entry() const {
    auto bytes = bytes_of("base.qcow2");
    const auto number = [&](std::size_t at) {
        std::uint64_t value = 0;
        for (int i = 0; i < 8; ++i) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
        return value & 0x00ff'ffff'ffff'fe00;
    };
    bytes[number(number(40)) + 6] = 2;  // the first entry's offset: no longer a multiple of the cluster size
    put_file(directory_.file("base.qcow2"), bytes);
}

}  // namespace qcow::test
