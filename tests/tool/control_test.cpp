// Images that qcow serve has open, changed by other commands through its control socket.

#include <nlohmann/json.hpp>

#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class ControlTool : public ToolTest {
protected:
    void SetUp() override {
        must_qemu_img({"create", "-q", "-f", "qcow2", "disk", "8M"}, directory_.path());
        must_qemu_img({"create", "-q", "-f", "qcow2", "second", "4M"}, directory_.path());
    }

    [[nodiscard]] std::unique_ptr<Subprocess> serve(const Arguments& images) const {
        Arguments arguments = {QCOW_TOOL, "serve", "--persistent", "--socket", "nbd", "--control", "control"};
        arguments.insert(arguments.end(), images.begin(), images.end());
        auto server = std::make_unique<Subprocess>(arguments, directory_.path());
        server->wait_for("sandbox: ");
        return server;
    }

    void write(const std::string& where, const std::string& name = "") const {
        must_run({"qemu-io", "-f", "raw", "-c", "write -q " + where, "nbd+unix:///" + name + "?socket=nbd"},
                 directory_.path());
    }

    [[nodiscard]] json node(std::size_t index = 0) const {
        return json::parse(must_tool({"control", "control", "query-named-block-nodes"}).out)[index];
    }
};

TEST_F(ControlTool, TheCommandsWorkOnARunningServer) {
    auto server = serve({"disk"});
    write("-P 1 0 64k");
    must_tool({"snapshot", "--control", "control", "-c", "monday"});
    must_tool({"bitmap", "--control", "control", "--add", "-g", "4k", "changes"});
    write("-P 2 0 64k");
    must_tool({"bitmap", "--control", "control", "--add", "--disable", "--merge", "changes", "copy"});
    EXPECT_THAT(must_tool({"snapshot", "--control", "control"}).out, HasSubstr("monday"));
    EXPECT_EQ(json::parse(must_tool({"snapshot", "-l", "--json", "--control", "control"}).out)[0]["virtual-size"],
              8 << 20);
    EXPECT_EQ(node()["dirty-bitmaps"].size(), 2U);
    must_tool({"resize", "--control", "control", "+8M"});
    EXPECT_EQ(must_run({"nbdinfo", "--size", "nbd+unix:///?socket=nbd"}, directory_.path()).out, "16777216\n");
    expect_refusal({"resize", "--control", "control", "--", "-4M"}, HasSubstr("--shrink"));
    must_tool({"resize", "--control", "control", "--shrink", "--", "-4M"});
    must_tool({"snapshot", "--control", "control", "--rename", "monday", "tuesday"});
    must_tool({"snapshot", "--control", "control", "-a", "tuesday"});
    must_run({"qemu-io", "-f", "raw", "-c", "read -q -P 1 0 64k", "nbd+unix:///?socket=nbd"}, directory_.path());
    must_tool({"snapshot", "--control", "control", "-d", "1"});
    must_tool({"control", "control", "flush"});
    must_tool({"control", "control", "quit"});
    EXPECT_EQ(server->finish().status, 0);
    EXPECT_EQ(files(), (std::set<std::string>{"disk", "second"}));
    must_qemu_img({"check", "disk"}, directory_.path());
    EXPECT_EQ(qemu_img_json({"info", "--output=json", "disk"}, directory_.path())["virtual-size"], 8 << 20);
}

TEST_F(ControlTool, SeveralImages) {
    const auto server = serve({"disk", "second"});
    expect_refusal({"snapshot", "--control", "control", "-c", "a"}, HasSubstr("\"disk\", \"second\""));
    expect_refusal({"snapshot", "--control", "control"}, HasSubstr("--image-name"));
    must_tool({"snapshot", "--control", "control", "--image-name", "second", "-c", "a"});
    EXPECT_EQ(node(0)["image"]["snapshots"].size(), 0U);
    EXPECT_EQ(node(1)["image"]["snapshots"].size(), 1U);
    must_tool({"resize", "--control", "control", "--image-name", "second", "5M"});
    must_tool({"bitmap", "--control", "control", "--image-name", "second", "--add", "b"});
    EXPECT_EQ(node(1)["image"]["virtual-size"], 5 << 20);
    EXPECT_EQ(node(1)["dirty-bitmaps"].size(), 1U);
    server->signal(SIGTERM);
}

TEST_F(ControlTool, Refusals) {
    expect_refusal({"snapshot"}, HasSubstr("IMAGE is missing"));
    expect_refusal({"resize", "disk"}, HasSubstr("SIZE is missing"));
    expect_refusal({"resize"}, HasSubstr("IMAGE and SIZE are missing"));
    expect_refusal({"bitmap", "--add", "disk"}, HasSubstr("BITMAP is missing"));
    expect_refusal({"resize", "--control", "none", "1M"}, HasSubstr("cannot connect"));
    expect_refusal({"control", "disk", "flush"}, HasSubstr("cannot connect"));
    expect_refusal({"control", "none", "flush", "x"}, HasSubstr("NAME=VALUE"));
    expect_refusal({"snapshot", "--image-name", "disk", "disk"}, HasSubstr("--control"));
    const auto server = serve({"--read-only", "disk"});
    expect_refusal({"snapshot", "--control", "control", "-c", "a", "disk"}, HasSubstr("in place of IMAGE"));
    expect_refusal({"resize", "--control", "control", "disk", "9M"}, HasSubstr("in place of IMAGE"));
    expect_refusal({"resize", "--control", "control"}, HasSubstr("SIZE is missing"));
    expect_refusal({"resize", "--control", "control", "9X"}, HasSubstr("9X"));
    expect_refusal({"snapshot", "--control", "control", "-c", "a"}, HasSubstr("read"));
    expect_refusal({"snapshot", "--control", "control", "-d", "a"}, HasSubstr("there is none"));
    expect_refusal({"control", "control", "nonsense"}, HasSubstr("query-commands"));
    expect_refusal({"bitmap", "--control", "control", "--merge", "a", "-b", "disk", "b"}, HasSubstr("--control"));
    server->signal(SIGTERM);
}

TEST_F(ControlTool, SilentClientsDoNotKeepOthersOut) {
    const auto server = serve({"disk"});
    std::vector<std::unique_ptr<Subprocess>> silent;
    for (unsigned i = 0; i < 20; ++i) {
        silent.push_back(std::make_unique<Subprocess>(
            std::vector<std::string>{"python3", "-c",
                                     "import socket, time; s = socket.socket(socket.AF_UNIX); s.connect('control'); "
                                     "print('there', flush=True); time.sleep(60)"},
            directory_.path()));
        silent.back()->wait_for("there");
    }
    must_tool({"control", "control", "flush"});
    server->signal(SIGTERM);
    for (const auto& client : silent) client->signal(SIGKILL);
}

TEST_F(ControlTool, WhatAnImageCannotKeepIsRefused) {
    const auto server = serve({"disk"});
    expect_refusal({"control", "control", "block-dirty-bitmap-add", "name=b", "persistent=false"},
                   HasSubstr("persistent"));
    must_tool({"control", "control", "block-dirty-bitmap-add", "name=b", "persistent=true"});
    server->signal(SIGTERM);
}

}  // namespace
}  // namespace qcow::test
