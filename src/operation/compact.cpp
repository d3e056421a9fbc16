#include "qcow/compact.h"

#include "base/try.h"
#include "base/within_memory.h"
#include "format/header.h"
#include "operation/metadata_files.h"
#include "qcow2/compaction.h"
#include "qcow2/metadata/directories.h"

namespace qcow {
namespace {

/// Null: nothing is to be decrypted.
Result<std::shared_ptr<const crypto::SectorCipher>> cipher_of(const CompactJob& job, const MetadataFiles& files) {
    const auto header = TRY(format::parse_header(TRY(qcow2::read_first_cluster(*files.image))));
    const bool moves = header.crypt == format::Crypt::luks && !job.dry_run;
    const bool is_read = header.crypt != format::Crypt::none && job.zeroes;
    if (files.data || job.compress || !(moves || is_read)) return nullptr;
    if (!job.image.keys) {
        return fail(Errc::encrypted, files.image->name(),
                    "it is encrypted, and its key is needed to move data and to find zeros");
    }
    return find_cipher(job.image, *files.image);
}

}  // namespace

Result<CompactResult> compact(const CompactJob& job, const JobControl& control) {
    return within_memory([&]() -> Result<CompactResult> {
        const auto files = TRY(open_metadata_files(job.image, !job.dry_run, "compacted"));
        constexpr std::uint64_t batch_bytes = 32 * MiB;
        auto result = TRY(
            qcow2::compact_image(files.image, files.data.get(), job, control, batch_bytes, TRY(cipher_of(job, files))));
        if (is_device(job.image)) result.size_after = result.size_before;
        return result;
    });
}

}  // namespace qcow
