#include "qcow2/writer.h"

#include <gtest/gtest.h>

#include <future>

#include "qcow2/open_parts.h"

namespace qcow::test {
namespace {

using namespace std::chrono_literals;

TEST(WriterTest, AFrozenImageIsReadAndNotWritten) {
    OpenParts open;
    qcow2::Writer writer(open.parts, *open.view, {});
    must(writer.open());
    must(writer.write({0}, repeated(512, 1)));
    ASSERT_TRUE(writer.freeze(1s));
    Bytes read(512);
    must(open.view->read({0}, read));
    EXPECT_EQ(read, repeated(512, 1));
    auto waits = std::async(std::launch::async, [&] { return writer.write({0}, repeated(512, 2)); });
    EXPECT_EQ(waits.wait_for(50ms), std::future_status::timeout);
    must(open.view->read({0}, read));
    EXPECT_EQ(read, repeated(512, 1));
    writer.thaw();
    must(waits.get());
    must(open.view->read({0}, read));
    EXPECT_EQ(read, repeated(512, 2));
    must(writer.settle());
}

}  // namespace
}  // namespace qcow::test
