// Memory runs out while pages are on their way to the disk.

#include <gtest/gtest.h>

#include "engine/image_kinds.h"
#include "memory/shortage.h"
#include "qcow2/metadata/write_back.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow::test {
namespace {

/// What was taken and not written would be missed by the next flush. So before that one can begin, there is none.
TEST(WriteBackMemory, WritingHasStoppedWhenItSaysSo) {
    constexpr unsigned changed_pages = 5;
    std::uint64_t failed = 0;
    for (std::uint64_t n = 0;; ++n, ++failed) {
        const auto file = memory_storage();
        CreateOptions options;
        options.size = std::uint64_t{1} << 30;
        must(create_image({file, nullptr}, options));
        Bytes cluster(65536);
        must(file->read({0}, cluster));
        qcow2::Metadata metadata(must(format::parse_header(cluster)), file, 1 << 20);
        qcow2::WriteBack write_back(metadata, nullptr, true);
        const std::uint64_t word = 0;
        for (unsigned i = 0; i < changed_pages; ++i) {
            for (const auto page_class : {qcow2::mapping_pages, qcow2::refcount_pages}) {
                const HostOffset at{(2 * i + (page_class == qcow2::mapping_pages ? 1 : 0)) * 2 * 4096};
                must(write_back.store(at, {&word, 1}, page_class, true));
            }
        }
        shortage = {.after = n};
        Result<void> written;
        {
            const Works engine(true);
            ASSERT_NO_THROW(written = write_back.write_all()) << "allocation " << n;
        }
        if (std::exchange(shortage, {}).hits == 0) break;
        ASSERT_FALSE(written) << "allocation " << n;
        EXPECT_EQ(written.error().code, Errc::no_memory);
        EXPECT_FALSE(write_back.verify_writable()) << "allocation " << n;
    }
    EXPECT_GT(failed, 2 * changed_pages);
}

}  // namespace
}  // namespace qcow::test
