#pragma once
// A directory with images, and the tool to run on them.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>

#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {

class ToolTest : public testing::Test {
protected:
    void SetUp() override;

    [[nodiscard]] Finished tool(Arguments arguments) const;

    Finished must_tool(const Arguments& arguments) const;

    /// Failure: status 1, nothing on standard output, one line that says why.
    void expect_refusal(const Arguments& arguments, const testing::Matcher<std::string>& message) const;

    [[nodiscard]] std::set<std::string> files() const;

    [[nodiscard]] std::string bytes_of(const std::string& name) const { return file_bytes(directory_.file(name)); }

    void corrupt_l2_entry() const;

    TemporaryDirectory directory_;
};

}  // namespace qcow::test
