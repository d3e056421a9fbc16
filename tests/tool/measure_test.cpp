// qcow measure beside qemu-img measure.

#include <nlohmann/json.hpp>

#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class MeasureTool : public ToolTest {
protected:
    [[nodiscard]] json ours(Arguments arguments) const {
        arguments.insert(arguments.begin(), {"measure", "--output=json"});
        return json::parse(must_tool(arguments).out);
    }
};

TEST_F(MeasureTool, SaysWhatTheFileThenTakes) {
    must_qemu_img({"bitmap", "--add", "top.qcow2", "changes"}, directory_.path());
    const auto measured = ours({"-O", "qcow2", "-o", "cluster_size=64k", "top.qcow2"});
    must_tool({"convert", "-O", "qcow2", "-o", "cluster_size=64k", "top.qcow2", "new"});
    EXPECT_EQ(measured["required"], std::filesystem::file_size(directory_.file("new")));
    EXPECT_EQ(measured["bitmaps"], 3 * 65536);
    EXPECT_EQ(json::parse(must_tool({"measure", "--json", "-O", "qcow2", "-o", "cluster_size=64k", "top.qcow2"}).out),
              measured);
    EXPECT_GT(ours({"-O", "qcow2", "-l", "before", "base.qcow2"})["required"], 65536);
    // A raw file, where both agree.
    for (const Arguments& arguments : std::initializer_list<Arguments>{{"measure", "top.qcow2"},
                                                                       {"measure", "--size", "1025", "-O", "raw"},
                                                                       {"measure", "--output", "json", "top.qcow2"}}) {
        const auto theirs = must_qemu_img(arguments, directory_.path()).out;
        const auto text = must_tool(arguments).out;
        if (text.starts_with("{")) {
            EXPECT_EQ(json::parse(text), json::parse(theirs));
        } else {
            EXPECT_EQ(text, theirs);
        }
    }
    EXPECT_EQ(ours({"-O", "qcow2", "-o", "data_file=none,size=1M"})["data-file"], 1048576);
    EXPECT_EQ(must_tool({"measure", "-O", "qcow2", "-o", "data_file=none", "--size", "1M"}).out,
              "required size: 262144\nfully allocated size: 327680\ndata file size: 1048576\n");
}

TEST_F(MeasureTool, Refusals) {
    expect_refusal({"measure"}, HasSubstr("give an IMAGE, or --size"));
    expect_refusal({"measure", "--size", "1M", "top.qcow2"}, HasSubstr("--size and IMAGE exclude each other"));
    expect_refusal({"measure", "--size", "1M", "-o", "size=2M"}, HasSubstr("twice"));
    expect_refusal({"measure", "--size", "1M", "-l", "before"}, HasSubstr("needs an IMAGE"));
    expect_refusal({"measure", "-O", "qcow2", "-o", "cluster_size=5", "top.qcow2"}, HasSubstr("cluster_size"));
    expect_refusal({"measure", "-O", "qcow2", "-o", "size=1M", "top.qcow2"}, HasSubstr("size"));
    expect_refusal({"measure", "-"}, HasSubstr("standard input"));
    expect_refusal({"measure", "--output=yaml", "top.qcow2"}, HasSubstr("human"));
    EXPECT_EQ(files(), (std::set<std::string>{"base.qcow2", "top.qcow2"}));
}

}  // namespace
}  // namespace qcow::test
