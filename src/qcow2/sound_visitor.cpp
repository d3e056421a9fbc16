#include "qcow2/sound_visitor.h"

#include "base/try.h"

namespace qcow::qcow2 {

Result<void> SoundVisitor::flaw(const Flaw& flaw) {
    const auto finding = finding_of(flaw, metadata_.geometry().cluster_bits);
    return fail(Errc::corrupt, finding.place, finding.what);
}

}  // namespace qcow::qcow2
