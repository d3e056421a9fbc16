#pragma once

#include "base/try.h"
#include "qcow/job.h"

namespace qcow {

/// Errc::cancelled once the caller of the job wants it to stop. Jobs ask before each piece of their work.
inline Result<void> verify_goes_on(const JobControl& control) {
    if (!control.stop.stop_requested()) return {};
    return fail(Errc::cancelled, "", "the job was cancelled");
}

}  // namespace qcow
